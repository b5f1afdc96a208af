// The table of kernels that exists once per instruction set. Everything else in csrc is free of intrinsics.
//
// All of them treat rows independently and in an order that does not depend on how many rows come together:
// a token's result is the same, bit for bit, alone and in any batch.
#pragma once
#include "blocks.h"

namespace miniphi {

// y[row + i][0..32) (+)= dequantised block x activations, i < num_rows <= tile_rows; sums that add start from y.
// Meanwhile what comes next is brought to the level-two cache: of each group those 64-byte lines whose bits are set.
struct Prefetch {
    const uint8_t* next;
    uint32_t lines;
};
using TileFn = void (*)(const uint8_t* block, Prefetch prefetch, const QuantRows& a, size_t row, int num_rows, float* y,
                        size_t y_stride, bool add);

// c[i][0..32) (+)= sum_k a[i][k] * panel[k][0..32), i < num_rows <= kMaxPanelRows; sums that add start from c.
using PanelFn = void (*)(const float* a, size_t a_stride, int num_rows, const void* panel, size_t depth, float* c,
                         size_t c_stride, bool add);

// Attention's p V over a quantised cache, one panel of 32 dims: c[i][0..32) = scale[i] sum over blocks b and tokens t of
// (128 high + low)[i][32 b + t] V[b][t][0..32), i < num_rows <= kMaxValueRows, over num_tokens tokens 32 b + t. panels[b] is
// the panel of block b (kv_cache.h), at most kMaxPanels of them: 32-bit sums are exact. Both planes hold 0 .. 127, and 0 for
// the last panel's further tokens, which may be read or not.
constexpr size_t kMaxPanels = 8;
constexpr int kMaxValueRows = 6;
struct WeightPlanes {
    const uint8_t *high, *low;
    size_t stride;
};
using ValuesFn = void (*)(const uint8_t* const* panels, size_t num_tokens, const WeightPlanes& weights, int num_rows,
                          const float* scale, float* c, size_t c_stride);

// Of one row of scores: weights are 2^(score - max), in units of `unit` where they are integers; `sum` is that of the
// weights themselves.
struct Softmax {
    float max, sum, unit;
};

struct Ops {
    const char* name;
    int tile_rows;                // the most rows that a tile takes, kMaxTileRows or fewer
    TileFn tile[kNumKinds];       // quantised kinds only
    PanelFn panel[3];             // F32, F16, BF16
    ValuesFn values_8, values_4;  // V of a Q8 and of a Q4 cache
    // q[k], scale[k/32], sum16[k/16] of one row; k is a multiple of 32. scale = max|x| / 127 per group.
    void (*quantize_row)(const float* x, size_t k, int8_t* q, float* scale, int32_t* sum16);
    // In wide groups: exponent[k/64] as in QuantRows; returns the row's scale, 2^-kMaxExponent max|x| / 127. A group's
    // power of two is the least that keeps its codes within 127.
    float (*quantize_wide)(const float* x, size_t k, int8_t* q, int32_t* exponent, int32_t* sum16);
    // One scale for n values, n a multiple of 16.
    float (*quantize_vector)(const float* x, size_t n, int8_t* q);
    void (*to_f16)(const float* x, size_t n, uint16_t* y);   // n a multiple of 16; saturates at +-65504
    // y = x / sqrt(mean(x^2) + eps) * weight
    void (*rms_norm)(const float* x, const float* weight, size_t n, float eps, float* y);
    void (*silu_mul)(const float* gate, const float* up, size_t n, float* y);   // y = up * gate / (1 + exp(-gate))
    void (*blend)(float alpha, float* x, float beta, const float* y, size_t n); // x = alpha x + beta y; n % 16 == 0
    // In place over n scores (a multiple of 32): 2^(s - max) inside [first, last), 0 outside.
    Softmax (*softmax)(float* s, size_t n, size_t first, size_t last);
    // The same, every weight times its scale >= 0 and rounded to 14 bits: 128 high + low, times unit. s is used up.
    Softmax (*quantized_softmax)(float* s, const float* scale, size_t n, size_t first, size_t last, uint8_t* high, uint8_t* low);
    // Calibration: keep the int8 units busy (returns operations done), read bytes as fast as possible.
    uint64_t (*spin_int8)(uint64_t iterations);
    uint64_t (*read_bytes)(const uint8_t* data, size_t bytes);
};

const Ops& ops_portable();
const Ops& ops_avx2();
const Ops& ops_avx512();
const Ops& ops_neon();

}  // namespace miniphi
