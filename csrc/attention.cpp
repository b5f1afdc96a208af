#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace miniphi {
namespace {

constexpr size_t kTileRows = 48;         // query rows that share one pass over the keys: 48 x 256 scores are 48 KiB
constexpr size_t kSplitTokens = 4;       // sequences with at most this many queries split their context
constexpr float kMinusInfinity = -INFINITY;

size_t value_bytes(CacheType type) { return type == CacheType::F32 ? 4 : type == CacheType::F16 ? 2 : 1; }

PanelFn panel_for(const Ops& ops, CacheType type) {
    if (type == CacheType::Q8) return ops.panel_i8;
    return ops.panel[int(type == CacheType::F32 ? Kind::F32 : Kind::F16)];
}

}  // namespace

KvCache::KvCache(const HeadShape& shape, CacheType type, size_t num_blocks)
    : shape_(shape),
      type_(type),
      num_blocks_(num_blocks),
      value_bytes_(value_bytes(type)),
      head_bytes_(head_bytes(shape, type)),
      memory_(shape.num_layers * num_blocks * shape.num_kv_heads * head_bytes_) {}

size_t KvCache::head_bytes(const HeadShape& shape, CacheType type) {
    const size_t values = (shape.head_dim + shape.padded_dim()) * kCacheBlock * value_bytes(type);
    return values + (type == CacheType::Q8 ? 2 * kCacheBlock * sizeof(float) : 0);
}

void KvCache::put(const Ops& ops, uint8_t* head, size_t slot, const float* key, const float* value) const {
    uint8_t* values = head + key_bytes();
    const size_t dim = shape_.head_dim;
    // Keys go to column `slot` of their panel; values to row `slot` of each 32-wide panel.
    const auto scatter = [&](auto* keys, auto* panels, const auto* k, const auto* v) {
        for (size_t i = 0; i < dim; i++) keys[i * kCacheBlock + slot] = k[i];
        for (size_t i = 0; i < dim; i++) panels[(i / 32 * kCacheBlock + slot) * 32 + i % 32] = v[i];
    };
    if (type_ == CacheType::F32) {
        scatter(reinterpret_cast<float*>(head), reinterpret_cast<float*>(values), key, value);
    } else if (type_ == CacheType::F16) {
        uint16_t k[512], v[512];
        ops.to_f16(key, dim, k);
        ops.to_f16(value, dim, v);
        scatter(reinterpret_cast<uint16_t*>(head), reinterpret_cast<uint16_t*>(values), k, v);
    } else {
        int8_t k[512], v[512];
        float* scale = scales(head);
        scale[slot] = ops.quantize_vector(key, dim, k);
        scale[kCacheBlock + slot] = ops.quantize_vector(value, dim, v);
        scatter(reinterpret_cast<int8_t*>(head), reinterpret_cast<int8_t*>(values), k, v);
    }
}

Attention::Attention(const Ops& ops, const HeadShape& shape, const KvCache& cache, int num_threads)
    : ops_(ops),
      shape_(shape),
      cache_(cache),
      tokens_per_tile_(std::max<size_t>(1, kTileRows / shape.group())),
      max_rows_(std::max(kSplitTokens, tokens_per_tile_) * shape.group()),
      scratch_(num_threads) {
    for (Scratch& s : scratch_) {
        s.query.resize(max_rows_ * shape.head_dim);
        s.scores.resize(max_rows_ * kChunk);
        s.chunk.resize(max_rows_ * shape.padded_dim());
        s.sum.resize(max_rows_ * shape.padded_dim());
        for (auto* v : {&s.chunk_max, &s.chunk_sum, &s.total_max, &s.total_sum}) v->resize(max_rows_);
    }
}

void Attention::plan(const Sequences& s) {
    items_.clear();
    merges_.clear();
    size_t num_parts = 0;
    for (size_t sequence = 0; sequence < s.num_sequences; sequence++) {
        const size_t first = s.query_starts[sequence], last = s.query_starts[sequence + 1];
        const bool split = last - first <= kSplitTokens;
        const size_t step = split ? 1 : tokens_per_tile_;
        for (size_t kv_head = 0; kv_head < shape_.num_kv_heads; kv_head++) {
            for (size_t token = first; token < last; token += step) {
                const size_t count = std::min(step, last - token);
                const size_t oldest = s.positions[token], newest = s.positions[token + count - 1];
                const size_t low = shape_.window && oldest + 1 > shape_.window ? oldest + 1 - shape_.window : 0;
                Item item{sequence, kv_head, token, count, low / kChunk, newest / kChunk + 1, -1};
                if (!split || item.last_chunk - item.first_chunk == 1) {
                    items_.push_back(item);
                    continue;
                }
                merges_.push_back({token, kv_head, num_parts, item.last_chunk - item.first_chunk});
                for (size_t chunk = item.first_chunk; chunk < item.last_chunk; chunk++)
                    items_.push_back({sequence, kv_head, token, 1, chunk, chunk + 1, ptrdiff_t(num_parts++)});
            }
        }
    }
    parts_.resize(std::max(parts_.size(), num_parts * shape_.group() * (shape_.padded_dim() + 2)));
}

void Attention::rope_and_append(const Sequences& s, size_t layer, float* qkv, int thread, int num_threads) const {
    const size_t dim = shape_.head_dim, half = shape_.rotary_dim / 2;
    const size_t width = shape_.query_width() + 2 * shape_.kv_width();
    const auto rotate = [&](float* x, const float* cos, const float* sin) {
        for (size_t i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cos[i] - b * sin[i];
            x[i + half] = b * cos[i] + a * sin[i];
        }
    };
    // Work is cut by head, so that one token keeps every thread busy and a thread writes whole cache lines of keys.
    const size_t heads = shape_.num_kv_heads;
    for (size_t sequence = 0; sequence < s.num_sequences; sequence++) {
        const int32_t* table = s.block_tables + sequence * s.max_blocks;
        for (size_t head = heads * thread / num_threads; head < heads * (thread + 1) / num_threads; head++) {
            for (int32_t t = s.query_starts[sequence]; t < s.query_starts[sequence + 1]; t++) {
                float *row = qkv + t * width, *key = row + shape_.query_width() + head * dim;
                const float *cos = s.cos + t * half, *sin = s.sin + t * half;
                for (size_t g = 0; g < shape_.group(); g++) rotate(row + (head * shape_.group() + g) * dim, cos, sin);
                rotate(key, cos, sin);
                const size_t position = s.positions[t];
                cache_.put(ops_, cache_.head(layer, table[position / kCacheBlock], head), position % kCacheBlock, key,
                           key + shape_.kv_width());
            }
        }
    }
}

void Attention::attend_chunk(const Sequences& s, const Item& item, size_t layer, size_t chunk, size_t num_rows,
                             Scratch& scratch) const {
    const size_t group = shape_.group(), dim = shape_.head_dim, padded = shape_.padded_dim(), start = chunk * kChunk;
    const int32_t* table = s.block_tables + item.sequence * s.max_blocks + chunk * kChunkBlocks;
    const auto visible = [&](size_t row, size_t* low, size_t* high) {   // keys of this chunk, [low, high)
        const size_t position = s.positions[item.token + row / group], end = position + 1;
        const size_t begin = shape_.window && end > shape_.window ? end - shape_.window : 0;
        *low = std::clamp(begin, start, start + kChunk) - start;
        *high = std::clamp(end, start, start + kChunk) - start;
    };
    size_t low, high, unused;
    visible(0, &low, &unused);
    visible(num_rows - 1, &unused, &high);
    const size_t first_block = low / kCacheBlock, last_block = (high + kCacheBlock - 1) / kCacheBlock;
    const PanelFn panel = panel_for(ops_, cache_.type());
    const bool scaled = cache_.type() == CacheType::Q8;

    for (size_t b = first_block; b < last_block; b++) {
        uint8_t* head = cache_.head(layer, table[b], item.kv_head);
        for (size_t row = 0; row < num_rows; row += kMaxPanelRows) {
            const int rows = int(std::min<size_t>(kMaxPanelRows, num_rows - row));
            float* scores = scratch.scores.data() + row * kChunk + b * kCacheBlock;
            panel(scratch.query.data() + row * dim, dim, rows, head, dim, scores, kChunk, false);
            if (scaled)
                for (int i = 0; i < rows; i++) ops_.multiply(scores + i * kChunk, cache_.scales(head), kCacheBlock);
        }
    }
    const size_t offset = first_block * kCacheBlock, count = (last_block - first_block) * kCacheBlock;
    for (size_t row = 0; row < num_rows; row++) {
        visible(row, &low, &high);
        low = std::clamp(low, offset, offset + count);
        high = std::clamp(high, low, offset + count);
        ops_.softmax(scratch.scores.data() + row * kChunk + offset, count, low - offset, high - offset,
                     &scratch.chunk_max[row], &scratch.chunk_sum[row]);
    }
    for (size_t b = first_block; b < last_block; b++) {
        uint8_t* head = cache_.head(layer, table[b], item.kv_head);
        for (size_t row = 0; row < num_rows; row += kMaxPanelRows) {
            const int rows = int(std::min<size_t>(kMaxPanelRows, num_rows - row));
            float* p = scratch.scores.data() + row * kChunk + b * kCacheBlock;
            if (scaled)
                for (int i = 0; i < rows; i++) ops_.multiply(p + i * kChunk, cache_.scales(head) + kCacheBlock, kCacheBlock);
            for (size_t i = 0; i < padded; i += 32)
                panel(p, kChunk, rows, head + cache_.key_bytes() + i / 32 * cache_.value_panel_bytes(), kCacheBlock,
                      scratch.chunk.data() + row * padded + i, padded, b > first_block);
        }
    }
}

// Merge the chunk into the running result: both are sums relative to their own maximum.
void Attention::fold(size_t num_rows, Scratch& scratch) const {
    const size_t padded = shape_.padded_dim();
    for (size_t row = 0; row < num_rows; row++) {
        if (scratch.chunk_max[row] == kMinusInfinity) continue;   // this row sees nothing of the chunk
        const float max = std::max(scratch.total_max[row], scratch.chunk_max[row]);
        const float alpha = std::exp(scratch.total_max[row] - max), beta = std::exp(scratch.chunk_max[row] - max);
        ops_.blend(alpha, scratch.sum.data() + row * padded, beta, scratch.chunk.data() + row * padded, padded);
        scratch.total_sum[row] = alpha * scratch.total_sum[row] + beta * scratch.chunk_sum[row];
        scratch.total_max[row] = max;
    }
}

void Attention::store(const float* sum, float total, float* out) const {
    const float inverse = 1.0f / total;
    for (size_t i = 0; i < shape_.head_dim; i++) out[i] = sum[i] * inverse;
}

void Attention::attend_item(const Sequences& s, const Item& item, size_t layer, const float* qkv, float* out,
                            Scratch& scratch) {
    const size_t group = shape_.group(), dim = shape_.head_dim, padded = shape_.padded_dim();
    const size_t num_rows = item.num_tokens * group, width = shape_.query_width() + 2 * shape_.kv_width();
    const float scale = 1.0f / std::sqrt(float(dim));
    for (size_t row = 0; row < num_rows; row++) {
        const float* q = qkv + (item.token + row / group) * width + (item.kv_head * group + row % group) * dim;
        for (size_t i = 0; i < dim; i++) scratch.query[row * dim + i] = q[i] * scale;
    }
    if (item.part >= 0) {
        attend_chunk(s, item, layer, item.first_chunk, num_rows, scratch);
        float* part = parts_.data() + item.part * group * (padded + 2);
        for (size_t row = 0; row < num_rows; row++, part += padded + 2) {
            std::memcpy(part, scratch.chunk.data() + row * padded, padded * sizeof(float));
            part[padded] = scratch.chunk_max[row];
            part[padded + 1] = scratch.chunk_sum[row];
        }
        return;
    }
    std::fill_n(scratch.sum.begin(), num_rows * padded, 0.0f);
    std::fill_n(scratch.total_max.begin(), num_rows, kMinusInfinity);
    std::fill_n(scratch.total_sum.begin(), num_rows, 0.0f);
    for (size_t chunk = item.first_chunk; chunk < item.last_chunk; chunk++) {
        attend_chunk(s, item, layer, chunk, num_rows, scratch);
        fold(num_rows, scratch);
    }
    for (size_t row = 0; row < num_rows; row++)
        store(scratch.sum.data() + row * padded, scratch.total_sum[row],
              out + (item.token + row / group) * shape_.query_width() + (item.kv_head * group + row % group) * dim);
}

void Attention::attend(const Sequences& s, size_t layer, const float* qkv, float* out, size_t queue, int thread,
                       WorkQueue& work) {
    size_t item;
    while (work.take(queue, thread, items_.size(), &item)) attend_item(s, items_[item], layer, qkv, out, scratch_[thread]);
}

void Attention::merge(float* out, int thread, int num_threads) const {
    const size_t group = shape_.group(), padded = shape_.padded_dim(), row_size = padded + 2;
    std::vector<float> sum(padded);
    for (size_t m = merges_.size() * thread / num_threads; m < merges_.size() * (thread + 1) / num_threads; m++) {
        const Merge& merge = merges_[m];
        for (size_t g = 0; g < group; g++) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            float total_max = kMinusInfinity, total_sum = 0;
            for (size_t i = 0; i < merge.num_parts; i++) {
                const float* part = parts_.data() + ((merge.first_part + i) * group + g) * row_size;
                if (part[padded] == kMinusInfinity) continue;
                const float max = std::max(total_max, part[padded]);
                const float alpha = std::exp(total_max - max), beta = std::exp(part[padded] - max);
                ops_.blend(alpha, sum.data(), beta, part, padded);
                total_sum = alpha * total_sum + beta * part[padded + 1];
                total_max = max;
            }
            store(sum.data(), total_sum, out + merge.token * shape_.query_width() + (merge.kv_head * group + g) * shape_.head_dim);
        }
    }
}

}  // namespace miniphi
