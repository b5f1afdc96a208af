#include "pack.h"

#include <cstring>

#include "half.h"

namespace miniphi {
namespace {

struct Stored {
    size_t values, bytes;   // of one stored block
};

Stored stored_of(Kind kind) {
    switch (kind) {
        case Kind::F32: return {1, 4};
        case Kind::F16:
        case Kind::BF16: return {1, 2};
        case Kind::Q8_0: return {32, 34};
        case Kind::Q4_0: return {32, 18};
        case Kind::Q4_1: return {32, 20};
        case Kind::Q5_0: return {32, 22};
        case Kind::Q5_1: return {32, 24};
        case Kind::Q4_K: return {256, 144};
        case Kind::Q5_K: return {256, 176};
        case Kind::Q6_K: return {256, 210};
        case Kind::IQ4_NL: return {32, 18};
        case Kind::NL4: return {64, 34};
    }
    return {1, 1};
}

uint16_t u16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return value;
}

void put_u16(uint8_t* p, uint16_t value) { std::memcpy(p, &value, 2); }

// 6-bit scale and minimum of sub-block j of a Q4_K or Q5_K superblock.
void super_scale(const uint8_t* scales, size_t j, uint8_t* scale, uint8_t* minimum) {
    if (j < 4) {
        *scale = scales[j] & 63;
        *minimum = scales[j + 4] & 63;
    } else {
        *scale = uint8_t((scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4));
        *minimum = uint8_t((scales[j + 4] >> 4) | ((scales[j] >> 6) << 4));
    }
}

// Codes (as stored in the packed block: unsigned, with the zero point inside) of group g of a stored row.
void codes_of(Kind kind, const uint8_t* row, size_t g, uint8_t* codes) {
    const Stored stored = stored_of(kind);
    const uint8_t* b = row + g * layout_of(kind).group / stored.values * stored.bytes;
    const size_t j = g % kSuperGroups;
    switch (kind) {
        case Kind::Q8_0:
            for (size_t i = 0; i < 32; i++) codes[i] = uint8_t(b[2 + i] + 128);
            return;
        case Kind::Q4_0:
        case Kind::Q4_1:
        case Kind::Q5_0:
        case Kind::Q5_1: {
            const bool five = kind == Kind::Q5_0 || kind == Kind::Q5_1;
            const uint8_t* p = b + (kind == Kind::Q4_1 || kind == Kind::Q5_1 ? 4 : 2);
            const uint8_t* nibbles = five ? p + 4 : p;
            for (size_t i = 0; i < 16; i++) {
                codes[i] = nibbles[i] & 15;
                codes[i + 16] = nibbles[i] >> 4;
            }
            if (five)
                for (size_t i = 0; i < 32; i++) codes[i] |= uint8_t(((p[i / 8] >> (i % 8)) & 1) << 4);
            return;
        }
        case Kind::IQ4_NL:
        case Kind::NL4: {   // the first half of a block in the low nibbles, the second in the high ones
            const size_t half = stored.values / 2;
            for (size_t i = 0; i < half; i++) {
                codes[i] = b[2 + i] & 15;
                codes[i + half] = b[2 + i] >> 4;
            }
            return;
        }
        case Kind::Q4_K:
        case Kind::Q5_K: {
            const uint8_t* nibbles = b + 16 + (kind == Kind::Q5_K ? 32 : 0) + 32 * (j / 2);
            for (size_t i = 0; i < 32; i++) codes[i] = uint8_t((nibbles[i] >> (4 * (j % 2))) & 15);
            if (kind == Kind::Q5_K)
                for (size_t i = 0; i < 32; i++) codes[i] |= uint8_t(((b[16 + i] >> j) & 1) << 4);
            return;
        }
        case Kind::Q6_K: {   // two halves of 128; in each, 4 groups of 32
            const size_t part = j % 4;
            const uint8_t *low = b + 64 * (j / 4) + 32 * (part % 2), *high = b + 128 + 32 * (j / 4);
            for (size_t i = 0; i < 32; i++)
                codes[i] = uint8_t(((low[i] >> (4 * (part / 2))) & 15) | (((high[i] >> (2 * part)) & 3) << 4));
            return;
        }
        default: return;
    }
}

void put_scales(Kind kind, const Layout& layout, const uint8_t* row, size_t g, size_t n, uint8_t* super, uint8_t* scales) {
    const Stored stored = stored_of(kind);
    const uint8_t* b = row + g * layout.group / stored.values * stored.bytes;
    const size_t j = g % kSuperGroups;
    switch (layout.scale) {
        case Scale::Symmetric: put_u16(scales + 2 * n, u16(b)); return;
        case Scale::Minimum:
            put_u16(scales + 2 * n, u16(b));
            put_u16(scales + 64 + 2 * n, u16(b + 2));
            return;
        case Scale::Super:
            put_u16(super + 2 * n, u16(b));
            put_u16(super + 64 + 2 * n, u16(b + 2));
            super_scale(b + 4, j, scales + n, scales + 32 + n);
            return;
        case Scale::SuperHalf:
            put_u16(super + 2 * n, u16(b + 208));
            scales[n] = b[192 + 8 * (j / 4) + 2 * (j % 4)];
            scales[32 + n] = b[192 + 8 * (j / 4) + 2 * (j % 4) + 1];
            return;
    }
}

// What the kernels multiply: the code, or for a non-linear format what it stands for, plus the zero point.
int value_at(const Layout& layout, const uint8_t* group, size_t i, size_t n) {
    const size_t half = n / 16, s = i / 4, byte = n % 16 * 4 + i % 4;
    const int bits = layout.bits;
    group += half * 64 + byte;
    if (bits == 8) return group[layout.code_offset(s)];
    int code = (group[layout.code_offset(s)] >> (4 * (s % 2))) & 15;
    if (bits > 4) code |= ((group[layout.high_offset(s)] >> layout.high_shift(s)) & (bits == 5 ? 1 : 3)) << 4;
    return layout.levels ? layout.levels[code] + layout.zero : code;
}

}  // namespace

void put_codes(const Layout& layout, size_t n, const uint8_t* codes, uint8_t* group) {
    const int bits = layout.bits;
    group += n / 16 * 64 + n % 16 * 4;
    const auto put = [&](size_t offset, uint32_t word) { std::memcpy(group + offset, &word, 4); };
    uint32_t step[kWideGroup / 4];
    std::memcpy(step, codes, layout.group);
    if (bits == 8) {
        for (size_t s = 0; s < 8; s++) put(layout.code_offset(s), step[s]);
        return;
    }
    constexpr uint32_t low = 0x0f0f0f0f;
    for (size_t s = 0; s < layout.steps(); s += 2) put(layout.code_offset(s), (step[s] & low) | ((step[s + 1] & low) << 4));
    if (bits == 4) return;
    for (size_t first = 0; first < layout.steps(); first += layout.high_steps()) {
        uint32_t word = 0;
        for (size_t s = first; s < first + layout.high_steps(); s++) word |= ((step[s] & ~low) >> 4) << layout.high_shift(s);
        put(layout.high_offset(first), word);
    }
}

size_t stored_row_bytes(Kind kind, size_t depth) {
    const Stored stored = stored_of(kind);
    return depth / stored.values * stored.bytes;
}

void pack_block(Kind kind, const uint8_t* const rows[kBlockColumns], size_t depth, uint8_t* block) {
    std::memset(block, 0, block_bytes(kind, depth));
    if (!is_quantized(kind)) {
        const size_t size = float_bytes(kind);
        for (size_t n = 0; n < kBlockColumns; n++) {
            if (!rows[n]) continue;
            if (size == 4) {
                for (size_t k = 0; k < depth; k++) std::memcpy(block + (k * kBlockColumns + n) * 4, rows[n] + k * 4, 4);
            } else {
                for (size_t k = 0; k < depth; k++) std::memcpy(block + (k * kBlockColumns + n) * 2, rows[n] + k * 2, 2);
            }
        }
        return;
    }
    const Layout layout = layout_of(kind);
    uint8_t* super = block;
    for (size_t g = 0; g < depth / layout.group; g++) {
        if (layout.super_bytes && g % kSuperGroups == 0) {
            super = block;
            block += layout.super_bytes;
        }
        for (size_t n = 0; n < kBlockColumns; n++) {
            if (!rows[n]) continue;
            uint8_t codes[kWideGroup];
            codes_of(kind, rows[n], g, codes);
            put_codes(layout, n, codes, block);
            put_scales(kind, layout, rows[n], g, n, super, block + layout.scale_offset());
        }
        block += layout.group_bytes;
    }
}

void unpack_column(Kind kind, const uint8_t* block, size_t n, size_t depth, float* y) {
    if (!is_quantized(kind)) {
        for (size_t k = 0; k < depth; k++) {
            const size_t index = k * kBlockColumns + n;
            if (kind == Kind::F32) std::memcpy(y + k, block + index * 4, 4);
            else y[k] = kind == Kind::F16 ? from_f16(u16(block + index * 2)) : from_bf16(u16(block + index * 2));
        }
        return;
    }
    const Layout layout = layout_of(kind);
    const uint8_t* super = block;
    for (size_t g = 0; g < depth / layout.group; g++, y += layout.group) {
        if (layout.super_bytes && g % kSuperGroups == 0) {
            super = block;
            block += layout.super_bytes;
        }
        const uint8_t* scales = block + layout.scale_offset();
        const float first = layout.super_bytes ? from_f16(u16(super + 2 * n)) : from_f16(u16(scales + 2 * n));
        for (size_t i = 0; i < layout.group; i++) {
            const int q = value_at(layout, block, i, n) - layout.zero;
            switch (layout.scale) {
                case Scale::Symmetric: y[i] = first * float(q); break;
                case Scale::Minimum: y[i] = first * float(q) + from_f16(u16(scales + 64 + 2 * n)); break;
                case Scale::Super:
                    y[i] = first * float(scales[n]) * float(q) - from_f16(u16(super + 64 + 2 * n)) * float(scales[32 + n]);
                    break;
                case Scale::SuperHalf: y[i] = first * float(int8_t(scales[32 * (i / 16) + n])) * float(q); break;
            }
        }
        block += layout.group_bytes;
    }
}

}  // namespace miniphi
