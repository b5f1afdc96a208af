#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cache_codes.h"
#include "half.h"
#include "pack.h"

namespace miniphi {
namespace {

constexpr size_t kMaxDim = 512;

Kind key_kind_of(CacheType type) {
    constexpr Kind kinds[kNumCacheTypes] = {Kind::F32, Kind::F16, Kind::Q8_0, Kind::Q5_0};
    return kinds[int(type)];
}

// Bytes of 32 tokens x 32 dims of V, scales apart.
size_t value_panel_bytes_of(CacheType type) {
    constexpr size_t bits[kNumCacheTypes] = {32, 16, 8, 4};
    return 32 * kCacheBlock * bits[int(type)] / 8;
}

constexpr size_t scale_bytes_of(CacheType type) {
    return type == CacheType::Q8 || type == CacheType::Q4 ? kCacheBlock * 2 : 0;
}

size_t key_bytes_of(const HeadShape& shape, CacheType type) {
    const Kind kind = key_kind_of(type);
    return block_bytes(kind, is_quantized(kind) ? shape.padded_dim() : shape.head_dim);
}

size_t heads_together_of(const HeadShape& shape) {
    size_t count = std::min(shape.num_kv_heads, kMaxHeadsTogether);
    while (shape.num_kv_heads % count) count--;
    return count;
}

void put_half(uint8_t* p, float value) {
    const uint16_t half = to_f16_scalar(value);
    std::memcpy(p, &half, 2);
}

}  // namespace

KvCache::KvCache(const HeadShape& shape, CacheType type, size_t num_blocks)
    : shape_(shape),
      type_(type),
      num_blocks_(num_blocks),
      num_extents_((num_blocks + kExtentBlocks - 1) / kExtentBlocks),
      heads_together_(heads_together_of(shape)),
      key_bytes_(key_bytes_of(shape, type)),
      value_panel_bytes_(value_panel_bytes_of(type)),
      memory_(shape.num_layers * num_extents_ * shape.num_kv_heads * kExtentBlocks * head_bytes(shape, type)) {}

Kind KvCache::key_kind() const { return key_kind_of(type_); }

size_t KvCache::head_bytes(const HeadShape& shape, CacheType type) {
    return key_bytes_of(shape, type) + shape.padded_dim() / 32 * value_panel_bytes_of(type) + scale_bytes_of(type);
}

KvCache::Head KvCache::head(size_t layer, size_t block, size_t kv_head) const {
    const size_t panels = shape_.padded_dim() / 32, scale_bytes = scale_bytes_of(type_);
    const size_t extent = layer * num_extents_ + block / kExtentBlocks, together = heads_together_;
    uint8_t* keys = memory_.data() + (extent * shape_.num_kv_heads + kv_head / together * together) * kExtentBlocks * head_bytes(shape_, type_);
    uint8_t* scales = keys + together * kExtentBlocks * key_bytes_;
    uint8_t* values = scales + together * kExtentBlocks * scale_bytes;
    const size_t member = kv_head % together, index = block % kExtentBlocks, place = member * kExtentBlocks + index;
    return {keys + place * key_bytes_, values + member * panels * value_stride() + index * value_panel_bytes_, scales + place * scale_bytes};
}

KvCache::Head KvCache::next(const Head& head) const {
    return {head.keys + kExtentBlocks * key_bytes_, head.values + shape_.padded_dim() / 32 * value_stride(),
            head.scales + kExtentBlocks * scale_bytes_of(type_)};
}

void KvCache::put(const Ops& ops, const Head& head, size_t slot, const float* key, const float* value) const {
    if (is_quantized()) return put_quantized(ops, head, slot, key, value);
    const size_t dim = shape_.head_dim;
    // Keys go to column `slot` of their panel; values to row `slot` of each 32-wide panel.
    const auto scatter = [&](const auto* k, const auto* v) {
        auto* keys = reinterpret_cast<std::remove_cvref_t<decltype(*k)>*>(head.keys);
        for (size_t i = 0; i < dim; i++) keys[i * kCacheBlock + slot] = k[i];
        for (size_t i = 0; i < dim; i += 32)
            std::memcpy(head.values + i / 32 * value_stride() + slot * 32 * sizeof *v, v + i, std::min<size_t>(32, dim - i) * sizeof *v);
    };
    if (type_ == CacheType::F32) {
        scatter(key, value);
    } else {
        uint16_t k[kMaxDim], v[kMaxDim];
        ops.to_f16(key, dim, k);
        ops.to_f16(value, dim, v);
        scatter(k, v);
    }
}

void KvCache::put_quantized(const Ops& ops, const Head& head, size_t slot, const float* key, const float* value) const {
    const size_t padded = shape_.padded_dim();
    const bool four = type_ == CacheType::Q4;
    const Layout layout = layout_of(key_kind());
    float k[kMaxDim], v[kMaxDim], key_scale[kMaxDim / 32], value_scale;
    uint8_t key_code[kMaxDim], value_code[kMaxDim];
    for (float* padding : {std::copy_n(key, shape_.head_dim, k), std::copy_n(value, shape_.head_dim, v)})
        std::fill_n(padding, padded - shape_.head_dim, 0.0f);
    if (four) {
        hadamard(k, padded);
        hadamard(v, padded);
        for (size_t g = 0; g < padded / 32; g++) key_scale[g] = quantize_5_bits(k + 32 * g, 32, key_code + 32 * g);
        value_scale = quantize_non_linear(v, padded, value_code);
    } else {
        int32_t sums[kMaxDim / 16];
        ops.quantize_row(k, padded, reinterpret_cast<int8_t*>(key_code), key_scale, sums);
        for (size_t i = 0; i < padded; i++) key_code[i] ^= 0x80;   // code + 128
        value_scale = ops.quantize_vector(v, padded, reinterpret_cast<int8_t*>(value_code));
    }
    // The token is row `slot` of K's column block: in every step, 4 codes are one 32-bit word.
    for (size_t g = 0; g < padded / 32; g++) {
        uint8_t* group = head.keys + g * layout.group_bytes;
        put_codes(layout, slot, key_code + 32 * g, group);
        put_half(group + layout.scale_offset() + 2 * slot, key_scale[g]);
    }
    // It is one k of V's panels: byte slot % 4 of step slot / 4, for every dim.
    const size_t step = slot / 4;
    for (size_t i = 0; i < padded; i += 32) {
        const uint8_t* code = value_code + i;
        uint8_t* to = head.values + i / 32 * value_stride() + (four ? step / 2 : step) * 128 + slot % 4;   // dim n's byte is at 4 n
        if (!four)
            for (size_t n = 0; n < 32; n++) to[4 * n] = code[n];
        else if (step % 2)
            for (size_t n = 0; n < 32; n++) to[4 * n] = uint8_t((to[4 * n] & 15) | (code[n] << 4));
        else
            for (size_t n = 0; n < 32; n++) to[4 * n] = uint8_t((to[4 * n] & 0xf0) | code[n]);
    }
    put_half(head.scales + 2 * slot, value_scale);
}

}  // namespace miniphi
