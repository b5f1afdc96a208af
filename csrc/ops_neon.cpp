// ARMv8.2-A with dot product (Cortex-A76, Neoverse N1, Apple M1 and later). Half precision is only converted, never
// computed with, and every AArch64 processor converts.
//
// tile      y[m][32] = sum over groups g of (sum_k q_w q_a) * d_g * s_mg, rows m <= 6. A 64-byte vector of the layout is
//           four 16-byte vectors of 4 columns x 4 k. SDOT takes its 4 activations from a lane, so one load of 16 serves
//           four steps without a broadcast. Both its operands are signed: codes of 4, 5, 6 bits are, as they come (the
//           zero point is paid for once per group: accumulators start at -zero * sum(q_a)); codes of 8 bits are made so.
//           A group's 4 columns are finished before the next 4 start, so that one int32 accumulator per row lives at a
//           time and the registers go to float sums. More rows mean fewer columns per pass over the block: see
//           tile_vectors. Passes after the first read the block from the cache. Counted in the compiled loop, not measured:
//           1.7 vector operations per SDOT for 6 rows of Q4_0, 2.0 of Q4_K, 2.6 of Q6_K, so at most 60, 50, 40 % of SDOT's peak.
// panel     the same for float panels (also attention's Q K^T and P V), see panel_vectors.
// With one or two rows a second set of int32 accumulators hides SDOT's latency; integers add exactly in any order.
#include <arm_neon.h>

#include "half.h"
#include "ops.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace miniphi {
namespace {

constexpr int kTileRows = 6;

constexpr int kLanes = 4;                                   // float or int32 values of a register
constexpr int kBlockVectors = int(kBlockColumns) / kLanes;

// Vectors of 4 columns per pass. Live at once: rows x vectors float sums, rows x (1 accumulator, 1 or 2 vectors of
// activations), codes and a mask.
constexpr int tile_vectors(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : 2; }

// Live at once: rows x vectors sums, the vectors of the panel and one activation.
constexpr int panel_vectors(int rows) { return rows <= 2 ? 8 : rows <= 6 ? 4 : 2; }

INLINE float32x4_t load_half(const void* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(p))));
}
INLINE uint64_t load_four(const void* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    return four;
}
INLINE float32x4_t small_unsigned(const void* p) {
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(load_four(p))))));
}
INLINE float32x4_t small_signed(const void* p) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(load_four(p))))));
}

// Codes of step kStep for 4 columns, whose bytes begin at w in every plane.
template <Kind kKind, int kStep>
INLINE int8x16_t codes_of(const uint8_t* w) {
    constexpr Layout layout = layout_of(kKind);
    constexpr int kBits = layout.bits;
    uint8x16_t v = vld1q_u8(w + layout.code_offset(kStep));
    if constexpr (kBits == 8) {
        v = veorq_u8(v, vdupq_n_u8(0x80));
    } else {
        if constexpr (kStep % 2) v = vshrq_n_u8(v, 4);
        else if constexpr (kBits == 4) v = vandq_u8(v, vdupq_n_u8(15));
        if constexpr (layout_of(kKind).levels != nullptr) return vqtbl1q_s8(vld1q_s8(layout_of(kKind).levels), v);
        if constexpr (kBits > 4) {
            constexpr int shift = layout.high_shift(kStep);
            uint8x16_t h = vld1q_u8(w + layout.high_offset(kStep));
            if constexpr (shift > 0) h = vshrq_n_u8(h, shift);
            if constexpr (shift + kBits - 4 < 8) h = vandq_u8(h, vdupq_n_u8(kBits == 5 ? 1 : 3));
            v = vsliq_n_u8(v, h, 4);   // keeps the low four bits of v, whatever is above them
        }
    }
    return vreinterpretq_s8_u8(v);
}

template <int kRows>
struct Accumulators {
    static constexpr int kSets = kRows <= 2 ? 2 : 1;
    int32x4_t v[kSets][kRows];
};

template <Kind kKind, int kRows, int kFirst, int kLast>
INLINE void dot_steps(const uint8_t* w, const int8_t* const* q, size_t k, Accumulators<kRows>& acc) {
    if constexpr (kFirst < kLast) {
        constexpr int set = kFirst % Accumulators<kRows>::kSets;
        const int8x16_t codes = codes_of<kKind, kFirst>(w);
        UNROLL for (int m = 0; m < kRows; m++) {
            const int8x16_t a = vld1q_s8(q[m] + k + kFirst / 4 * 16);
            acc.v[set][m] = vdotq_laneq_s32(acc.v[set][m], codes, a, kFirst % 4);
        }
        dot_steps<kKind, kRows, kFirst + 1, kLast>(w, q, k, acc);
    }
}

template <int kRows>
struct Rows {
    const int8_t* q[kRows];
    const float *scale[kRows], *scaled_sum[kRows];
    const int32_t *correction[kRows], *exponent[kRows];
};

template <int kRows>
INLINE Rows<kRows> rows_from(const QuantRows& a, size_t row) {
    Rows<kRows> rows;
    UNROLL for (int m = 0; m < kRows; m++) {
        rows.q[m] = a.q + (row + m) * a.q_stride;
        rows.scale[m] = a.scale + (row + m) * a.scale_stride;
        rows.scaled_sum[m] = a.scaled_sum + (row + m) * a.scale_stride;
        rows.correction[m] = a.correction + (row + m) * a.correction_stride;
        rows.exponent[m] = a.exponent + (row + m) * a.groups;
    }
    return rows;
}

INLINE float32x4_t times(float32x4_t d, float scale) { return vmulq_n_f32(d, scale); }
INLINE float32x4_t times(float32x4_t d, int32_t exponent) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(d), vdupq_n_s32(exponent)));
}

// sum[m] += group g of 4 columns; w is the group, `vector` which 4 columns.
template <Kind kKind, int kRows>
INLINE void add_group(const uint8_t* w, const uint8_t* super, int vector, const Rows<kRows>& a, size_t g, float32x4_t* sum) {
    constexpr Layout layout = layout_of(kKind);
    constexpr bool has_zero = layout.zero != 0 && layout.bits != 8 && layout.levels == nullptr;   // those are signed instead
    constexpr int parts = layout.scale == Scale::SuperHalf ? 2 : 1;
    const uint8_t *scales = w + layout.scale_offset(), *codes = w + 16 * vector;
    const int n = kLanes * vector;
    UNROLL for (int part = 0; part < parts; part++) {
        // Without this the compiler keeps the activations of all columns alive at once and spills.
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        Accumulators<kRows> acc;
        UNROLL for (int m = 0; m < kRows; m++) {
            acc.v[0][m] = vdupq_n_s32(has_zero ? a.correction[m][g * parts + part] : 0);
            if constexpr (acc.kSets == 2) acc.v[1][m] = vdupq_n_s32(0);
        }
        if constexpr (parts == 1) {
            dot_steps<kKind, kRows, 0, layout.steps()>(codes, a.q, g * layout.group, acc);
        } else {
            if (part == 0) dot_steps<kKind, kRows, 0, 4>(codes, a.q, g * kGroup, acc);
            else dot_steps<kKind, kRows, 4, 8>(codes, a.q, g * kGroup, acc);
        }
        float32x4_t d;
        if constexpr (layout.scale == Scale::Super) d = vmulq_f32(load_half(super + 2 * n), small_unsigned(scales + n));
        else if constexpr (layout.scale == Scale::SuperHalf)
            d = vmulq_f32(load_half(super + 2 * n), small_signed(scales + 32 * part + n));
        else d = load_half(scales + 2 * n);
        UNROLL for (int m = 0; m < kRows; m++) {
            int32x4_t dot = acc.v[0][m];
            if constexpr (acc.kSets == 2) dot = vaddq_s32(dot, acc.v[1][m]);
            float32x4_t factor;
            if constexpr (layout.is_wide()) factor = times(d, a.exponent[m][g]);
            else factor = times(d, a.scale[m][g]);
            sum[m] = vfmaq_f32(sum[m], vcvtq_f32_s32(dot), factor);
        }
    }
    if constexpr (layout.scale == Scale::Minimum) {
        const float32x4_t minimum = load_half(scales + 64 + 2 * n);
        UNROLL for (int m = 0; m < kRows; m++) sum[m] = vfmaq_n_f32(sum[m], minimum, a.scaled_sum[m][g]);
    }
    if constexpr (layout.scale == Scale::Super) {
        const float32x4_t minimum = vmulq_f32(load_half(super + 64 + 2 * n), small_unsigned(scales + 32 + n));
        UNROLL for (int m = 0; m < kRows; m++) sum[m] = vfmsq_n_f32(sum[m], minimum, a.scaled_sum[m][g]);
    }
}

// y[m][4 first .. 4 (first + tile_vectors)) for all of K; `first` is a multiple of tile_vectors.
template <Kind kKind, int kRows>
INLINE void tile_pass(const uint8_t* w, Prefetch prefetch, int first, const QuantRows& a, size_t row, float* y, size_t y_stride, bool add) {
    constexpr int vectors = tile_vectors(kRows);
    constexpr Layout layout = layout_of(kKind);
    const Rows<kRows> rows = rows_from<kRows>(a, row);
    float32x4_t sum[vectors][kRows];
    UNROLL for (int v = 0; v < vectors; v++) {
        UNROLL for (int m = 0; m < kRows; m++)
            sum[v][m] = add && !layout.is_wide() ? vld1q_f32(y + m * y_stride + kLanes * (first + v)) : vdupq_n_f32(0);
    }
    const uint8_t* super = w;
    for (size_t g = 0; g < a.groups; g++) {
        for (size_t i = 0; i < layout.group_bytes / 64; i++)
            if (prefetch.lines & (1u << i)) __builtin_prefetch(prefetch.next + 64 * i, 0, 2);
        prefetch.next += layout.group_bytes;
        if constexpr (layout.super_bytes > 0) {
            if (g % kSuperGroups == 0) {
                super = w;
                w += layout.super_bytes;
            }
        }
        UNROLL for (int v = 0; v < vectors; v++) add_group<kKind, kRows>(w, super, first + v, rows, g, sum[v]);
        w += layout.group_bytes;
    }
    UNROLL for (int v = 0; v < vectors; v++) {
        UNROLL for (int m = 0; m < kRows; m++) {
            float* to = y + m * y_stride + kLanes * (first + v);
            if constexpr (layout.is_wide()) sum[v][m] = vfmaq_n_f32(add ? vld1q_f32(to) : vdupq_n_f32(0), sum[v][m], *rows.scale[m]);
            vst1q_f32(to, sum[v][m]);
        }
    }
}

template <Kind kKind, int kRows = kTileRows>
void tile(const uint8_t* block, Prefetch prefetch, const QuantRows& a, size_t row, int num_rows, float* y, size_t y_stride,
          bool add) {
    if constexpr (kRows > 1)
        if (num_rows < kRows) return tile<kKind, kRows - 1>(block, prefetch, a, row, num_rows, y, y_stride, add);
    for (int first = 0; first < kBlockVectors; first += tile_vectors(kRows), prefetch.lines = 0)
        tile_pass<kKind, kRows>(block, prefetch, first, a, row, y, y_stride, add);
}

enum class Element { F32, F16, BF16 };

// Eight values of a panel.
template <Element kElement>
INLINE float32x4x2_t load_panel(const void* panel, size_t index) {
    if constexpr (kElement == Element::F32) {
        const float* p = static_cast<const float*>(panel) + index;
        return {vld1q_f32(p), vld1q_f32(p + 4)};
    } else {
        const uint16x8_t p = vld1q_u16(static_cast<const uint16_t*>(panel) + index);
        if constexpr (kElement == Element::F16) {
            const float16x8_t half = vreinterpretq_f16_u16(p);
            return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
        } else {
            const uint16x8_t zero = vdupq_n_u16(0);
            return {vreinterpretq_f32_u16(vzip1q_u16(zero, p)), vreinterpretq_f32_u16(vzip2q_u16(zero, p))};
        }
    }
}

template <Element kElement, int kRows>
INLINE void panel_pass(const float* a, size_t a_stride, const void* panel, size_t first, size_t depth, float* c,
                       size_t c_stride, bool add) {
    constexpr int vectors = panel_vectors(kRows);
    float32x4_t sum[kRows][vectors];
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int v = 0; v < vectors; v++)
            sum[m][v] = add ? vld1q_f32(c + m * c_stride + first + kLanes * v) : vdupq_n_f32(0);
    }
    for (size_t k = 0; k < depth; k++) {
        float32x4x2_t p[vectors / 2];
        UNROLL for (int v = 0; v < vectors / 2; v++) p[v] = load_panel<kElement>(panel, k * kBlockColumns + first + 8 * v);
        UNROLL for (int m = 0; m < kRows; m++) {
            const float x = a[m * a_stride + k];
            UNROLL for (int v = 0; v < vectors; v++) sum[m][v] = vfmaq_n_f32(sum[m][v], p[v / 2].val[v % 2], x);
        }
    }
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int v = 0; v < vectors; v++) vst1q_f32(c + m * c_stride + first + kLanes * v, sum[m][v]);
    }
}

template <Element kElement, int kRows = kMaxPanelRows>
void panel(const float* a, size_t a_stride, int num_rows, const void* data, size_t depth, float* c, size_t c_stride,
           bool add) {
    if constexpr (kRows > 1)
        if (num_rows < kRows) return panel<kElement, kRows - 1>(a, a_stride, num_rows, data, depth, c, c_stride, add);
    for (size_t first = 0; first < kBlockColumns; first += kLanes * panel_vectors(kRows))
        panel_pass<kElement, kRows>(a, a_stride, data, first, depth, c, c_stride, add);
}

// Signed values of step s for 4 dims, byte offset `lane` of the step's 128, of a panel of V.
template <int kBits>
INLINE int8x16_t values_at(const uint8_t* panel, int s, int lane) {
    if constexpr (kBits == 8) return vld1q_s8(reinterpret_cast<const int8_t*>(panel) + s * 128 + lane);
    uint8x16_t v = vld1q_u8(panel + s / 2 * 128 + lane);
    v = s % 2 ? vshrq_n_u8(v, 4) : vandq_u8(v, vdupq_n_u8(15));
    return vqtbl1q_s8(vld1q_s8(kLevelsIQ4NL), v);
}

// 4 dims at a time; the weights of four steps are one vector, and SDOT takes a lane of it.
template <int kBits>
void values(const uint8_t* const* panels, size_t num_tokens, const WeightPlanes& p, int num_rows,
            const float* scale, float* c, size_t c_stride) {
    for (int row = 0; row < num_rows; row++) {
        for (int lane = 0; lane < 128; lane += 16) {
            int32x4_t high = vdupq_n_s32(0), low = high;
            for (size_t b = 0; 32 * b < num_tokens; b++) {
                UNROLL for (int part = 0; part < 2; part++) {
                    const size_t k = row * p.stride + 32 * b + 16 * part;
                    const int8x16_t a = vreinterpretq_s8_u8(vld1q_u8(p.high + k)), z = vreinterpretq_s8_u8(vld1q_u8(p.low + k));
                    const int s = 4 * part;
                    const int8x16_t v[4] = {values_at<kBits>(panels[b], s, lane), values_at<kBits>(panels[b], s + 1, lane),
                                            values_at<kBits>(panels[b], s + 2, lane), values_at<kBits>(panels[b], s + 3, lane)};
                    high = vdotq_laneq_s32(vdotq_laneq_s32(high, v[0], a, 0), v[1], a, 1);
                    high = vdotq_laneq_s32(vdotq_laneq_s32(high, v[2], a, 2), v[3], a, 3);
                    low = vdotq_laneq_s32(vdotq_laneq_s32(low, v[0], z, 0), v[1], z, 1);
                    low = vdotq_laneq_s32(vdotq_laneq_s32(low, v[2], z, 2), v[3], z, 3);
                }
            }
            const int32x4_t sum = vaddq_s32(vshlq_n_s32(high, 7), low);
            vst1q_f32(c + row * c_stride + lane / 4, vmulq_n_f32(vcvtq_f32_s32(sum), scale[row]));
        }
    }
}

// 16 values to int8 and their sum.
INLINE int32_t quantize16(const float* x, float inverse, int8_t* q) {
    int32x4_t codes[4];
    UNROLL for (int j = 0; j < 4; j++) codes[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + kLanes * j), inverse));
    const int16x8_t a = vqmovn_high_s32(vqmovn_s32(codes[0]), codes[1]);
    const int16x8_t b = vqmovn_high_s32(vqmovn_s32(codes[2]), codes[3]);
    const int8x16_t bytes = vqmovn_high_s16(vqmovn_s16(a), b);
    vst1q_s8(q, bytes);
    return vaddlvq_s8(bytes);
}

// The largest absolute value, n a multiple of 16.
INLINE float largest(const float* x, size_t n) {
    float32x4_t top[4];
    UNROLL for (int j = 0; j < 4; j++) top[j] = vdupq_n_f32(0);
    for (size_t i = 0; i < n; i += 16) {
        UNROLL for (int j = 0; j < 4; j++) top[j] = vmaxq_f32(top[j], vabsq_f32(vld1q_f32(x + i + kLanes * j)));
    }
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(top[0], top[1]), vmaxq_f32(top[2], top[3])));
}

float quantize_vector(const float* x, size_t n, int8_t* q) {
    const float max = largest(x, n), inverse = max >= kLeastActivation ? 127.0f / max : 0;
    for (size_t i = 0; i < n; i += 16) quantize16(x + i, inverse, q + i);
    return max / 127.0f;
}

void quantize_row(const float* x, size_t k, int8_t* q, float* scale, int32_t* sum16) {
    for (size_t g = 0; g < k / kGroup; g++, x += kGroup, q += kGroup, sum16 += 2) {
        const float max = largest(x, kGroup), inverse = max >= kLeastActivation ? 127.0f / max : 0;
        for (int h = 0; h < 2; h++) sum16[h] = quantize16(x + 16 * h, inverse, q + 16 * h);
        scale[g] = max / 127.0f;
    }
}

float quantize_wide(const float* x, size_t k, int8_t* q, int32_t* exponent, int32_t* sum16) {
    float max = 0;
    for (size_t g = 0; g < k / kWideGroup; g++) {
        const float top = largest(x + g * kWideGroup, kWideGroup);
        exponent[g] = int32_t(bits_of(top));
        if (top > max) max = top;
    }
    const float inverse = max >= kLeastActivation ? 127.0f / max : 0;
    const int32_t top = int32_t(bits_of(max));
    for (size_t g = 0; g < k / kWideGroup; g++, x += kWideGroup, q += kWideGroup, sum16 += 4) {
        const int down = lower_exponent(top, exponent + g);
        for (int h = 0; h < 4; h++) sum16[h] = quantize16(x + 16 * h, inverse * float(1 << down), q + 16 * h);
    }
    return max / 127.0f * kExponentUnit;
}

void to_f16(const float* x, size_t n, uint16_t* y) {
    const float32x4_t high = vdupq_n_f32(65504.0f), low = vdupq_n_f32(-65504.0f);
    for (size_t i = 0; i < n; i += kLanes) {
        const float32x4_t v = vmaxq_f32(vminq_f32(vld1q_f32(x + i), high), low);
        vst1_u16(y + i, vreinterpret_u16_f16(vcvt_f16_f32(v)));
    }
}

// 2^(n + r) for a whole n >= -126 and r in [-1/2, 1/2]; see ops_avx512.cpp.
INLINE float32x4_t power_of_two(float32x4_t n, float32x4_t r) {
    float32x4_t p = vdupq_n_f32(1.32647273e-3f);
    p = vfmaq_f32(vdupq_n_f32(9.67151299e-3f), p, r);
    p = vfmaq_f32(vdupq_n_f32(5.55073358e-2f), p, r);
    p = vfmaq_f32(vdupq_n_f32(2.40222424e-1f), p, r);
    p = vfmaq_f32(vdupq_n_f32(6.93147004e-1f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    // Unsigned: the exponent of a lane that is masked out later may overflow.
    const uint32x4_t power = vshlq_n_u32(vaddq_u32(vreinterpretq_u32_s32(vcvtq_s32_f32(n)), vdupq_n_u32(127)), 23);
    return vmulq_f32(p, vreinterpretq_f32_u32(power));
}

INLINE float32x4_t power_of_two(float32x4_t x) {
    x = vmaxq_f32(x, vdupq_n_f32(-126.0f));
    const float32x4_t n = vrndnq_f32(x);
    return power_of_two(n, vsubq_f32(x, n));
}

INLINE float32x4_t exponential(float32x4_t x) {
    x = vmaxq_f32(x, vdupq_n_f32(-87.3f));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269502f));
    const float32x4_t r = vfmaq_n_f32(vnegq_f32(n), x, 1.44269502f);
    return power_of_two(n, vfmaq_n_f32(r, x, 1.92596304e-8f));
}

// The first min(4, left) values, then zeros.
INLINE float32x4_t load_some(const float* p, size_t left) {
    if (left >= kLanes) return vld1q_f32(p);
    float v[kLanes] = {};
    for (size_t i = 0; i < left; i++) v[i] = p[i];
    return vld1q_f32(v);
}

INLINE void store_some(float* p, size_t left, float32x4_t value) {
    if (left >= kLanes) return vst1q_f32(p, value);
    float v[kLanes];
    vst1q_f32(v, value);
    for (size_t i = 0; i < left; i++) p[i] = v[i];
}

INLINE float add_up(const float32x4_t* v) { return vaddvq_f32(vaddq_f32(vaddq_f32(v[0], v[1]), vaddq_f32(v[2], v[3]))); }

void rms_norm(const float* x, const float* weight, size_t n, float eps, float* y) {
    float32x4_t squares[4];
    UNROLL for (int j = 0; j < 4; j++) squares[j] = vdupq_n_f32(0);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        UNROLL for (int j = 0; j < 4; j++) {
            const float32x4_t v = vld1q_f32(x + i + kLanes * j);
            squares[j] = vfmaq_f32(squares[j], v, v);
        }
    }
    for (; i < n; i += kLanes) {
        const float32x4_t v = load_some(x + i, n - i);
        squares[0] = vfmaq_f32(squares[0], v, v);
    }
    const float inverse = 1.0f / __builtin_sqrtf(add_up(squares) / float(n) + eps);
    for (i = 0; i < n; i += kLanes) {
        const float32x4_t v = vmulq_n_f32(load_some(x + i, n - i), inverse);
        store_some(y + i, n - i, vmulq_f32(v, load_some(weight + i, n - i)));
    }
}

void silu_mul(const float* gate, const float* up, size_t n, float* y) {
    const float32x4_t one = vdupq_n_f32(1), limit = vdupq_n_f32(88.0f);
    for (size_t i = 0; i < n; i += kLanes) {
        const float32x4_t g = load_some(gate + i, n - i);
        const float32x4_t e = exponential(vminq_f32(vnegq_f32(g), limit));
        const float32x4_t silu = vdivq_f32(g, vaddq_f32(one, e));
        store_some(y + i, n - i, vmulq_f32(load_some(up + i, n - i), silu));
    }
}

void blend(float alpha, float* x, float beta, const float* y, size_t n) {
    for (size_t i = 0; i < n; i += kLanes)
        vst1q_f32(x + i, vfmaq_n_f32(vmulq_n_f32(vld1q_f32(x + i), alpha), vld1q_f32(y + i), beta));
}

template <bool kScaled>   // as in ops_avx512.cpp
INLINE Softmax weigh(float* s, const float* scale, size_t n, size_t first, size_t last) {
    const uint32x4_t lane = {0, 1, 2, 3}, start = vdupq_n_u32(uint32_t(first)), end = vdupq_n_u32(uint32_t(last));
    const auto inside = [&](size_t i) __attribute__((always_inline)) {
        const uint32x4_t index = vaddq_u32(vdupq_n_u32(uint32_t(i)), lane);
        return vandq_u32(vcgeq_u32(index, start), vcltq_u32(index, end));
    };
    const float32x4_t lowest = vdupq_n_f32(-__builtin_inff());
    float32x4_t top[4], total[4], largest = vdupq_n_f32(0);
    UNROLL for (int j = 0; j < 4; j++) {
        top[j] = lowest;
        total[j] = vdupq_n_f32(0);
    }
    for (size_t i = 0; i < n; i += 16) {
        UNROLL for (int j = 0; j < 4; j++) {
            const size_t at = i + kLanes * j;
            top[j] = vmaxq_f32(top[j], vbslq_f32(inside(at), vld1q_f32(s + at), lowest));
        }
    }
    const float max = vmaxvq_f32(vmaxq_f32(vmaxq_f32(top[0], top[1]), vmaxq_f32(top[2], top[3])));
    const float32x4_t shift = vdupq_n_f32(max);
    for (size_t i = 0; i < n; i += 16) {
        UNROLL for (int j = 0; j < 4; j++) {
            const size_t at = i + kLanes * j;
            const float32x4_t power = power_of_two(vsubq_f32(vld1q_f32(s + at), shift));
            float32x4_t p = vreinterpretq_f32_u32(vandq_u32(inside(at), vreinterpretq_u32_f32(power)));
            total[j] = vaddq_f32(total[j], p);
            if constexpr (kScaled) {
                p = vmulq_f32(p, vld1q_f32(scale + at));
                largest = vmaxq_f32(largest, p);
            }
            vst1q_f32(s + at, p);
        }
    }
    return {max, add_up(total), kScaled ? vmaxvq_f32(largest) : 1.0f};
}

Softmax softmax(float* s, size_t n, size_t first, size_t last) { return weigh<false>(s, nullptr, n, first, last); }

Softmax quantized_softmax(float* s, const float* scale, size_t n, size_t first, size_t last, uint8_t* high, uint8_t* low) {
    Softmax result = weigh<true>(s, scale, n, first, last);
    const float inverse = result.unit > 0 ? 16383.0f / result.unit : 0;
    for (size_t i = 0; i < n; i += 16) {
        uint16x8_t words[2];
        UNROLL for (int j = 0; j < 2; j++) {
            uint32x4_t q[2];
            UNROLL for (int h = 0; h < 2; h++) q[h] = vcvtnq_u32_f32(vmulq_n_f32(vld1q_f32(s + i + 8 * j + kLanes * h), inverse));
            words[j] = vmovn_high_u32(vmovn_u32(q[0]), q[1]);
        }
        vst1q_u8(high + i, vmovn_high_u16(vmovn_u16(vshrq_n_u16(words[0], 7)), vshrq_n_u16(words[1], 7)));
        vst1q_u8(low + i, vandq_u8(vmovn_high_u16(vmovn_u16(words[0]), words[1]), vdupq_n_u8(127)));
    }
    result.unit /= 16383.0f;
    return result;
}

uint64_t spin_int8(uint64_t iterations) {
    int32x4_t acc[16];
    int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(1);
    UNROLL for (int i = 0; i < 16; i++) acc[i] = vdupq_n_s32(i);
    for (uint64_t n = 0; n < iterations; n++) {
        UNROLL for (int i = 0; i < 16; i++) acc[i] = vdotq_s32(acc[i], a, b);
        asm volatile("" : "+w"(a), "+w"(b));
    }
    volatile uint32_t sink = 0;
    UNROLL for (int i = 0; i < 16; i++) sink = sink + uint32_t(vaddvq_s32(acc[i]));
    return iterations * 16 * 32;
}

uint64_t read_bytes(const uint8_t* data, size_t bytes) {
    uint8x16_t sum[16];
    UNROLL for (int j = 0; j < 16; j++) sum[j] = vdupq_n_u8(0);
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
        UNROLL for (int j = 0; j < 16; j++) sum[j] = veorq_u8(sum[j], vld1q_u8(data + i + 16 * j));
    }
    UNROLL for (int j = 1; j < 16; j++) sum[0] = veorq_u8(sum[0], sum[j]);
    const uint64x2_t words = vreinterpretq_u64_u8(sum[0]);
    return vgetq_lane_u64(words, 0) ^ vgetq_lane_u64(words, 1);
}

}  // namespace

const Ops& ops_neon() {
    static const Ops table = {
        "neon",
        kTileRows,
        {nullptr, nullptr, nullptr, tile<Kind::Q8_0>, tile<Kind::Q4_0>, tile<Kind::Q4_1>, tile<Kind::Q5_0>,
         tile<Kind::Q5_1>, tile<Kind::Q4_K>, tile<Kind::Q5_K>, tile<Kind::Q6_K>, tile<Kind::IQ4_NL>, tile<Kind::NL4>},
        {panel<Element::F32>, panel<Element::F16>, panel<Element::BF16>},
        values<8>, values<4>,
        quantize_row, quantize_wide, quantize_vector, to_f16, rms_norm, silu_mul, blend, softmax, quantized_softmax, spin_int8, read_bytes,
    };
    return table;
}

}  // namespace miniphi
