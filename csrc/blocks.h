// Formats of packed weights and quantised activations. Plain data only: every instruction-set file includes this.
//
// A packed matrix is a row of *column blocks*: 32 output rows of W (32 columns of the product), all of K.
// A quantised block is a stream of K-groups of 32 (NL4: of 64); inside a group the codes of its 32 rows are interleaved
// for 4-way int8 dot products: vector s (64 bytes) of half h holds, for its 16 rows n, the 4 codes k = 4s .. 4s+3
// at bytes 4n .. 4n+3. Steps s = 0..7 (0..15) cover the group.
//
//   low plane   4-, 5-, 6-bit codes: for j = s / 2, h = 0..1 one vector; low nibble step 2j, high nibble step 2j+1
//               8-bit codes: for every s, h = 0..1 one vector of code + 128
//   high plane  5 bits: for h = 0..1 one vector, bit s of a byte belongs to step s
//               6 bits: for i = 0..1, h = 0..1 one vector, bits 2(s-4i) and +1 belong to step s
//   scales      see Scale below
//
// A vector of high bits lies before the low ones that it completes, scales lie last: addresses rise in the order in which a
// kernel reads (Q6_K's, which it needs in between, in the middle). Where they jumped, memory gave a third less. Every part is
// a multiple of 64 bytes.
// Float blocks are panels [K][32]: also the layout of keys ([head_dim][32 tokens]) and values ([32 tokens][32]).
#pragma once
#include <cstddef>
#include <cstdint>

namespace miniphi {

constexpr size_t kBlockColumns = 32;   // output rows of W in one block
constexpr size_t kGroup = 32;          // values that share an activation scale, where the format has no other group
constexpr size_t kWideGroup = 64;      // their scales are a row's own times powers of two
constexpr size_t kSuperGroups = 8;     // groups in a K-quant superblock of 256
constexpr int kMaxTileRows = 8;        // rows of a quantised tile; Ops::tile_rows says how many of them
constexpr int kMaxPanelRows = 8;

// The order is that of kernels/__init__.py::Kind. NL4 is ours: the codes of IQ4_NL in groups of 64.
enum class Kind : int { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, IQ4_NL, NL4 };
constexpr int kNumKinds = 13;
constexpr bool is_quantized(Kind kind) { return kind >= Kind::Q8_0; }

enum class Scale {
    Symmetric,   // per group: f16 d[32].                                     w = d (q - zero)
    Minimum,     // per group: f16 d[32], f16 m[32].                          w = d q + m
    Super,       // per 8 groups first: f16 d[32], f16 dmin[32]; per group: u8 s[32], u8 m[32].   w = d s q - dmin m
    SuperHalf,   // per 8 groups first: f16 d[32]; per group: i8 s[2][32], one per 16 codes.      w = d s (q - zero)
};

// What non-linear codes stand for: denser around zero, as weights are. IQ4_NL's are ggml's; NL4's are the fixed point of
// Lloyd's algorithm on groups of 64 (checkpoint/codebook.py).
constexpr int8_t kLevelsIQ4NL[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kLevelsNL4[16] = {-127, -97, -75, -58, -44, -31, -19, -8, 2, 12, 23, 34, 47, 62, 80, 104};

struct Layout {
    int bits;
    Scale scale;
    int zero;                // zero point of the value multiplied, 0 where the format has a minimum
    size_t group_bytes;      // codes and scales of one group, 32 rows
    size_t super_bytes = 0;  // what comes once per 8 groups
    size_t group = kGroup;   // or kWideGroup
    const int8_t* levels = nullptr;   // of a non-linear format: a code is an index; multiplied is levels[code] + 128

    constexpr size_t code_bytes() const {
        return bits == 8 ? group * kBlockColumns : group * kBlockColumns / 2 + size_t(bits - 4) * 128;
    }
    constexpr size_t steps() const { return group / 4; }
    constexpr size_t high_steps() const { return bits == 5 ? 8 : bits == 6 ? 4 : steps(); }   // that a vector of high bits covers
    // The vectors of a step, half 0; the other half's are 64 bytes on. Two steps share a vector of nibbles.
    constexpr size_t code_offset(size_t step) const {
        if (bits == 8) return step * 128;
        if (bits == 4) return step / 2 * 128;
        return high_offset(step) + 128 + step % high_steps() / 2 * 128;
    }
    constexpr size_t high_offset(size_t step) const { return step / high_steps() * (high_steps() * 64 + 128 + (has_halves() ? 64 : 0)); }
    constexpr int high_shift(size_t step) const { return int(step % high_steps()) * (bits - 4); }
    constexpr bool has_halves() const { return scale == Scale::SuperHalf; }   // its scales lie between them
    constexpr size_t scale_offset() const { return has_halves() ? code_bytes() / 2 : code_bytes(); }
    constexpr bool is_wide() const { return group == kWideGroup; }
};

constexpr Layout layout_of(Kind kind) {
    switch (kind) {
        case Kind::Q8_0: return {8, Scale::Symmetric, 128, 1024 + 64};
        case Kind::Q4_0: return {4, Scale::Symmetric, 8, 512 + 64};
        case Kind::Q4_1: return {4, Scale::Minimum, 0, 512 + 128};
        case Kind::Q5_0: return {5, Scale::Symmetric, 16, 512 + 128 + 64};
        case Kind::Q5_1: return {5, Scale::Minimum, 0, 512 + 128 + 128};
        case Kind::Q4_K: return {4, Scale::Super, 0, 512 + 64, 128};
        case Kind::Q5_K: return {5, Scale::Super, 0, 512 + 128 + 64, 128};
        case Kind::Q6_K: return {6, Scale::SuperHalf, 32, 512 + 256 + 64, 64};
        case Kind::IQ4_NL: return {4, Scale::Symmetric, 128, 512 + 64, 0, kGroup, kLevelsIQ4NL};
        case Kind::NL4: return {4, Scale::Symmetric, 128, 1024 + 64, 0, kWideGroup, kLevelsNL4};
        default: return {0, Scale::Symmetric, 0, 0};
    }
}

constexpr size_t float_bytes(Kind kind) { return kind == Kind::F32 ? 4 : 2; }

// Bytes of one block of 32 rows. depth = K.
constexpr size_t block_bytes(Kind kind, size_t depth) {
    if (!is_quantized(kind)) return depth * kBlockColumns * float_bytes(kind);
    const Layout layout = layout_of(kind);
    const size_t groups = depth / layout.group;
    return groups * layout.group_bytes + (layout.super_bytes ? groups / kSuperGroups * layout.super_bytes : 0);
}

// Activations of one matmul: x[row][k] is about q[row][k] * scale[row][k / 32], or in wide groups
// q[row][k] * scale[row] * 2^exponent[row][k / 64]. A power of two times the scale of a weight is one addition of
// integers, exponent to exponent, which leaves the multipliers to the products; the row's scale is multiplied with at the
// end. Exponents are 0 .. kMaxExponent and stored where a float has its own, so a weight's scale of 0 stays next to 0.
constexpr int kExponentShift = 23;
constexpr int kMaxExponent = 30;
constexpr float kExponentUnit = 1.0f / (1 << kMaxExponent);
constexpr float kLeastActivation = 0x1p-80f;   // a group, or a row of wide ones, whose values all lie below it counts as zeros

// Given the bits of a group's maximum and of its row's, store the group's exponent and return how far it lies below the
// largest one. Positive floats are ordered as their bits are: with m the maximum of the group and t of the row, the largest
// n for which t / 2^n >= m is (bits(t) - bits(m)) >> 23. Internal linkage on purpose, as in half.h.
static inline int lower_exponent(int32_t top, int32_t* exponent) {
    int down = (top - *exponent) >> kExponentShift;
    if (down > kMaxExponent) down = kMaxExponent;
    *exponent = (kMaxExponent - down) << kExponentShift;
    return down;
}

struct QuantRows {
    const int8_t* q;             // [rows][q_stride]
    const float* scale;          // [rows][scale_stride]
    const int32_t* exponent;     // [rows][groups] << kExponentShift; wide groups only
    const int32_t* correction;   // [rows][correction_stride]: -zero * sum(q), per group, or per half group for Q6_K
    const float* scaled_sum;     // [rows][scale_stride]: scale * sum(q), what a minimum is multiplied with
    size_t q_stride, scale_stride, correction_stride;
    size_t groups;               // that a product runs over
};

}  // namespace miniphi
