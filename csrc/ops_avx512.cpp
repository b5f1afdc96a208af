// AVX-512 with VNNI (Ice Lake, Zen 4 and later).
//
// tile      y[m][32] = sum over groups g of (sum_k q_w q_a) * d_g * s_mg, rows m <= 8. Codes are unpacked in registers;
//           one broadcast of 4 activations feeds two VPDPBUSD (u8 codes x s8 activations). The zero point is paid for
//           once per group: accumulators start at -zero * sum(q_a). With 6 rows 12 int32 and 12 float accumulators, two
//           code vectors, mask and broadcast fill the 32 registers; with 8 the float ones live in memory and codes are
//           unpacked less often, which is as fast. 10 and 12 rows are slower.
// panel     the same shape for float panels (also attention's Q K^T and P V).
// With one or two rows a second set of int32 accumulators hides VPDPBUSD's latency; integers add exactly in any order.
#include <immintrin.h>

#include "half.h"
#include "ops.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace miniphi {
namespace {

INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
INLINE __m512 load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
INLINE __m512i broadcast4(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

// What is multiplied in a step for 16 rows, given its nibbles (already shifted for odd steps) and its vector of high bits.
template <Kind kKind, int kStep>
INLINE __m512i values_of(__m512i nibbles, const uint8_t* high_bits) {
    constexpr Layout layout = layout_of(kKind);
    constexpr int kBits = layout.bits;
    const __m512i low = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
    if constexpr (layout.levels != nullptr) {
        const __m128i table = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(layout.levels)), _mm_set1_epi8(char(0x80)));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), low);
    }
    if constexpr (kBits == 4) return low;
    constexpr int shift = layout.high_shift(kStep) - 4;
    __m512i high = load(high_bits);
    if constexpr (shift > 0) high = _mm512_srli_epi16(high, shift);
    if constexpr (shift < 0) high = _mm512_slli_epi16(high, -shift);
    // low | (high & mask)
    return _mm512_ternarylogic_epi64(low, high, _mm512_set1_epi8(kBits == 5 ? 0x10 : 0x30), 0xf8);
}

template <int kRows>
struct Accumulators {
    static constexpr int kSets = kRows <= 2 ? 2 : 1;
    __m512i v[kSets][kRows][2];
};

// One column of a matrix of activations, scales or corrections, as x86 addresses it: a base and a stride serve three rows,
// so that pointers do not push each other out of the registers.
template <typename T, int kRows>
struct Cursor {
    static constexpr int kBases = (kRows + 2) / 3;
    T* base[kBases];
    size_t stride;
    Cursor(T* data, size_t stride, size_t row) : stride(stride) {
        UNROLL for (int i = 0; i < kBases; i++) base[i] = data + (row + 3 * i) * stride;
        advance(0);
    }
    T* row(int m) const { return base[m / 3] + m % 3 * stride; }
    void advance(size_t columns) {
        UNROLL for (int i = 0; i < kBases; i++) {
            base[i] += columns;
            asm("" : "+r"(base[i]));   // else the compiler derives one from the other again
        }
    }
};

template <Kind kKind, int kStep, int kRows>
INLINE void step(const uint8_t* w, Prefetch prefetch, const Cursor<const int8_t, kRows>& q, Accumulators<kRows>& acc) {
    constexpr Layout layout = layout_of(kKind);
    constexpr int kBits = layout.bits;
    constexpr size_t lines = layout.group_bytes / 64;
    // Spread over the steps: the processor drops what exceeds its few outstanding misses.
    if constexpr (kRows > 1)
        for (size_t i = kStep * lines / layout.steps(); i < (kStep + 1) * lines / layout.steps(); i++)
            if (prefetch.lines & (1u << i)) _mm_prefetch(reinterpret_cast<const char*>(prefetch.next) + 64 * i, _MM_HINT_T1);
    constexpr int set = kStep % Accumulators<kRows>::kSets;
    __m512i codes[2];
    UNROLL for (int h = 0; h < 2; h++) {
        codes[h] = load(w + layout.code_offset(kStep) + h * 64);
        if constexpr (kBits == 8) continue;
        if constexpr (kStep % 2) codes[h] = _mm512_srli_epi16(codes[h], 4);
        codes[h] = values_of<kKind, kStep>(codes[h], w + layout.high_offset(kStep) + h * 64);
    }
    UNROLL for (int m = 0; m < kRows; m++) {
        const __m512i a = broadcast4(q.row(m) + kStep * 4);
        acc.v[set][m][0] = _mm512_dpbusd_epi32(acc.v[set][m][0], codes[0], a);
        acc.v[set][m][1] = _mm512_dpbusd_epi32(acc.v[set][m][1], codes[1], a);
    }
}

template <Kind kKind, int kRows, int kFirst, int kLast>
INLINE void steps(const uint8_t* w, Prefetch prefetch, const Cursor<const int8_t, kRows>& q, Accumulators<kRows>& acc) {
    if constexpr (kFirst < kLast) {
        step<kKind, kFirst, kRows>(w, prefetch, q, acc);
        steps<kKind, kRows, kFirst + 1, kLast>(w, prefetch, q, acc);
    }
}

template <int kRows>
INLINE void start(Accumulators<kRows>& acc, bool has_zero, const Cursor<const int32_t, kRows>& correction, size_t index) {
    UNROLL for (int m = 0; m < kRows; m++) {
        const __m512i first = has_zero ? _mm512_set1_epi32(correction.row(m)[index]) : _mm512_setzero_si512();
        acc.v[0][m][0] = acc.v[0][m][1] = first;
        if constexpr (Accumulators<kRows>::kSets == 2) acc.v[1][m][0] = acc.v[1][m][1] = _mm512_setzero_si512();
    }
}

INLINE __m512 times(__m512 d, float scale) { return _mm512_mul_ps(d, _mm512_set1_ps(scale)); }
INLINE __m512 times(__m512 d, int32_t exponent) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(d), _mm512_set1_epi32(exponent)));
}

// `scale` holds those of the activations' groups: floats, or exponents of wide groups.
template <int kRows, typename T>
INLINE void finish(const Accumulators<kRows>& acc, const __m512* d, const Cursor<const T, kRows>& scale, __m512 (*sum)[2]) {
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int h = 0; h < 2; h++) {
            __m512i dot = acc.v[0][m][h];
            if constexpr (Accumulators<kRows>::kSets == 2) dot = _mm512_add_epi32(dot, acc.v[1][m][h]);
            sum[m][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), times(d[h], *scale.row(m)), sum[m][h]);
        }
    }
}

INLINE __m512 small_unsigned(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE __m512 small_signed(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

template <Kind kKind, int kRows>
void tile_rows(const uint8_t* w, Prefetch prefetch, const QuantRows& a, size_t row, float* y, size_t y_stride, bool add) {
    constexpr Layout layout = layout_of(kKind);
    constexpr size_t parts = layout.scale == Scale::SuperHalf ? 2 : 1;
    Cursor<const int8_t, kRows> q(a.q, a.q_stride, row);
    constexpr bool is_wide = layout.is_wide();
    Cursor<const float, kRows> scale(a.scale, a.scale_stride, row), scaled_sum(a.scaled_sum, a.scale_stride, row);
    Cursor<const int32_t, kRows> correction(a.correction, a.correction_stride, row), exponent(a.exponent, a.groups, row);
    Cursor<float, kRows> out(y, y_stride, 0);
    __m512 sum[kRows][2];
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int h = 0; h < 2; h++)
            sum[m][h] = add && !is_wide ? _mm512_loadu_ps(out.row(m) + 16 * h) : _mm512_setzero_ps();
    }
    const uint8_t* super = w;
    for (size_t g = 0; g < a.groups; g++) {
        if constexpr (layout.super_bytes > 0) {
            if (g % kSuperGroups == 0) {
                super = w;
                w += layout.super_bytes;
                prefetch.next += layout.super_bytes;
            }
        }
        const uint8_t* scales = w + layout.scale_offset();
        Accumulators<kRows> acc;
        __m512 d[2];
        if constexpr (layout.scale == Scale::SuperHalf) {
            start(acc, true, correction, 0);
            steps<kKind, kRows, 0, 4>(w, prefetch, q, acc);
            UNROLL for (int h = 0; h < 2; h++) d[h] = _mm512_mul_ps(load_half(super + 32 * h), small_signed(scales + 16 * h));
            finish(acc, d, scale, sum);
            start(acc, true, correction, 1);
            steps<kKind, kRows, 4, 8>(w, prefetch, q, acc);
            UNROLL for (int h = 0; h < 2; h++) d[h] = _mm512_mul_ps(load_half(super + 32 * h), small_signed(scales + 32 + 16 * h));
            finish(acc, d, scale, sum);
        } else {
            start(acc, layout.zero != 0, correction, 0);
            steps<kKind, kRows, 0, layout.steps()>(w, prefetch, q, acc);
            UNROLL for (int h = 0; h < 2; h++) {
                if constexpr (layout.scale == Scale::Super)
                    d[h] = _mm512_mul_ps(load_half(super + 32 * h), small_unsigned(scales + 16 * h));
                else d[h] = load_half(scales + 32 * h);
            }
            if constexpr (is_wide) finish(acc, d, exponent, sum);
            else finish(acc, d, scale, sum);
        }
        if constexpr (layout.scale == Scale::Minimum || layout.scale == Scale::Super) {
            UNROLL for (int h = 0; h < 2; h++) {
                __m512 minimum;
                if constexpr (layout.scale == Scale::Minimum) minimum = load_half(scales + 64 + 32 * h);
                else minimum = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(load_half(super + 64 + 32 * h), small_unsigned(scales + 32 + 16 * h)));
                UNROLL for (int m = 0; m < kRows; m++)
                    sum[m][h] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(*scaled_sum.row(m)), sum[m][h]);
            }
        }
        w += layout.group_bytes;
        prefetch.next += layout.group_bytes;
        asm("" : "+r"(prefetch.lines));   // else every bit is kept apart, in memory
        q.advance(layout.group);
        if constexpr (is_wide) exponent.advance(1);
        else scale.advance(1);
        if constexpr (layout.zero != 0) correction.advance(parts);
        else scaled_sum.advance(1);
    }
    out.advance(0);
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int h = 0; h < 2; h++) {
            if constexpr (is_wide) {
                const __m512 old = add ? _mm512_loadu_ps(out.row(m) + 16 * h) : _mm512_setzero_ps();
                sum[m][h] = _mm512_fmadd_ps(sum[m][h], _mm512_set1_ps(*scale.row(m)), old);
            }
            _mm512_storeu_ps(out.row(m) + 16 * h, sum[m][h]);
        }
    }
}

template <Kind kKind>
void tile(const uint8_t* block, Prefetch prefetch, const QuantRows& a, size_t row, int num_rows, float* y, size_t y_stride,
          bool add) {
    switch (num_rows) {
        case 1: return tile_rows<kKind, 1>(block, prefetch, a, row, y, y_stride, add);
        case 2: return tile_rows<kKind, 2>(block, prefetch, a, row, y, y_stride, add);
        case 3: return tile_rows<kKind, 3>(block, prefetch, a, row, y, y_stride, add);
        case 4: return tile_rows<kKind, 4>(block, prefetch, a, row, y, y_stride, add);
        case 5: return tile_rows<kKind, 5>(block, prefetch, a, row, y, y_stride, add);
        case 6: return tile_rows<kKind, 6>(block, prefetch, a, row, y, y_stride, add);
        case 7: return tile_rows<kKind, 7>(block, prefetch, a, row, y, y_stride, add);
        default: return tile_rows<kKind, 8>(block, prefetch, a, row, y, y_stride, add);
    }
}

enum class Element { F32, F16, BF16 };

template <Element kElement>
INLINE __m512 load_panel(const void* panel, size_t index) {
    if constexpr (kElement == Element::F32) return _mm512_loadu_ps(static_cast<const float*>(panel) + index);
    if constexpr (kElement == Element::F16) return load_half(static_cast<const uint16_t*>(panel) + index);
    const void* p = static_cast<const uint16_t*>(panel) + index;
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <Element kElement, int kRows>
void panel_rows(const float* a, size_t a_stride, const void* panel, size_t depth, float* c, size_t c_stride, bool add) {
    __m512 sum[kRows][2];
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int h = 0; h < 2; h++) sum[m][h] = add ? _mm512_loadu_ps(c + m * c_stride + 16 * h) : _mm512_setzero_ps();
    }
    for (size_t k = 0; k < depth; k++) {
        const __m512 p0 = load_panel<kElement>(panel, k * kBlockColumns);
        const __m512 p1 = load_panel<kElement>(panel, k * kBlockColumns + 16);
        UNROLL for (int m = 0; m < kRows; m++) {
            const __m512 x = _mm512_set1_ps(a[m * a_stride + k]);
            sum[m][0] = _mm512_fmadd_ps(x, p0, sum[m][0]);
            sum[m][1] = _mm512_fmadd_ps(x, p1, sum[m][1]);
        }
    }
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int h = 0; h < 2; h++) _mm512_storeu_ps(c + m * c_stride + 16 * h, sum[m][h]);
    }
}

template <Element kElement>
void panel(const float* a, size_t a_stride, int num_rows, const void* data, size_t depth, float* c, size_t c_stride,
           bool add) {
    switch (num_rows) {
        case 1: return panel_rows<kElement, 1>(a, a_stride, data, depth, c, c_stride, add);
        case 2: return panel_rows<kElement, 2>(a, a_stride, data, depth, c, c_stride, add);
        case 3: return panel_rows<kElement, 3>(a, a_stride, data, depth, c, c_stride, add);
        case 4: return panel_rows<kElement, 4>(a, a_stride, data, depth, c, c_stride, add);
        case 5: return panel_rows<kElement, 5>(a, a_stride, data, depth, c, c_stride, add);
        case 6: return panel_rows<kElement, 6>(a, a_stride, data, depth, c, c_stride, add);
        case 7: return panel_rows<kElement, 7>(a, a_stride, data, depth, c, c_stride, add);
        default: return panel_rows<kElement, 8>(a, a_stride, data, depth, c, c_stride, add);
    }
}

// Signed values of step kStep, half h, of a panel of V.
template <int kBits, int kStep>
INLINE __m512i values_at(const uint8_t* panel, int h) {
    if constexpr (kBits == 8) return load(panel + (2 * kStep + h) * 64);
    __m512i v = load(panel + (2 * (kStep / 2) + h) * 64);
    if constexpr (kStep % 2) v = _mm512_srli_epi16(v, 4);
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevelsIQ4NL)));
    return _mm512_shuffle_epi8(table, _mm512_and_si512(v, _mm512_set1_epi8(15)));
}

// The first num_steps of a panel's 8 steps, of 4 tokens each.
template <int kBits, int kStep, int kRows>
INLINE void value_steps(const uint8_t* panel, int num_steps, const WeightPlanes& p, size_t k, __m512i (*high)[2], __m512i (*low)[2]) {
    if constexpr (kStep < 8) {
        if (kStep == num_steps) return;
        const __m512i v[2] = {values_at<kBits, kStep>(panel, 0), values_at<kBits, kStep>(panel, 1)};
        UNROLL for (int m = 0; m < kRows; m++) {
            const __m512i a = broadcast4(p.high + m * p.stride + k + 4 * kStep), b = broadcast4(p.low + m * p.stride + k + 4 * kStep);
            UNROLL for (int h = 0; h < 2; h++) {
                high[m][h] = _mm512_dpbusd_epi32(high[m][h], a, v[h]);
                low[m][h] = _mm512_dpbusd_epi32(low[m][h], b, v[h]);
            }
        }
        value_steps<kBits, kStep + 1, kRows>(panel, num_steps, p, k, high, low);
    }
}

template <int kBits, int kRows>
void value_rows(const uint8_t* const* panels, size_t num_tokens, const WeightPlanes& p, const float* scale, float* c,
                size_t c_stride) {
    __m512i high[kRows][2], low[kRows][2];
    UNROLL for (int m = 0; m < kRows; m++) high[m][0] = high[m][1] = low[m][0] = low[m][1] = _mm512_setzero_si512();
    size_t first = 0;   // token of the panel
    for (; first + 32 <= num_tokens; first += 32) value_steps<kBits, 0, kRows>(*panels++, 8, p, first, high, low);
    if (first < num_tokens) value_steps<kBits, 0, kRows>(*panels, int(num_tokens - first + 3) / 4, p, first, high, low);
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int h = 0; h < 2; h++) {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[m][h], 7), low[m][h]);
            _mm512_storeu_ps(c + m * c_stride + 16 * h, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale[m])));
        }
    }
}

template <int kBits>
void values(const uint8_t* const* panels, size_t num_tokens, const WeightPlanes& p, int num_rows, const float* scale, float* c,
            size_t c_stride) {
    switch (num_rows) {
        case 1: return value_rows<kBits, 1>(panels, num_tokens, p, scale, c, c_stride);
        case 2: return value_rows<kBits, 2>(panels, num_tokens, p, scale, c, c_stride);
        case 3: return value_rows<kBits, 3>(panels, num_tokens, p, scale, c, c_stride);
        case 4: return value_rows<kBits, 4>(panels, num_tokens, p, scale, c, c_stride);
        case 5: return value_rows<kBits, 5>(panels, num_tokens, p, scale, c, c_stride);
        default: return value_rows<kBits, 6>(panels, num_tokens, p, scale, c, c_stride);
    }
}

INLINE __m512 absolute(__m512 x) { return _mm512_abs_ps(x); }

INLINE __m128i quantize16(const float* x, __m512 inverse) {
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), inverse)));
}

float quantize_vector(const float* x, size_t n, int8_t* q) {
    __m512 top = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) top = _mm512_max_ps(top, absolute(_mm512_loadu_ps(x + i)));
    const float max = _mm512_reduce_max_ps(top);
    const __m512 inverse = _mm512_set1_ps(max >= kLeastActivation ? 127.0f / max : 0);
    for (size_t i = 0; i < n; i += 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), quantize16(x + i, inverse));
    return max / 127.0f;
}

template <int kParts>   // of 16 values in a group
INLINE __m512 largest(const float* x) {
    __m512 top = _mm512_setzero_ps();
    UNROLL for (int h = 0; h < kParts; h++) top = _mm512_max_ps(top, absolute(_mm512_loadu_ps(x + 16 * h)));
    return top;
}

template <int kParts>
INLINE void quantize_group(const float* x, __m512 inverse, int8_t* q, int32_t* sum16) {
    UNROLL for (int h = 0; h < kParts; h++) {
        const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * h), inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * h), _mm512_cvtepi32_epi8(codes));
        sum16[h] = _mm512_reduce_add_epi32(codes);
    }
}

void quantize_row(const float* x, size_t k, int8_t* q, float* scale, int32_t* sum16) {
    for (size_t g = 0; g < k / kGroup; g++, x += kGroup, q += kGroup, sum16 += 2) {
        const float max = _mm512_reduce_max_ps(largest<2>(x));
        quantize_group<2>(x, _mm512_set1_ps(max >= kLeastActivation ? 127.0f / max : 0), q, sum16);
        scale[g] = max / 127.0f;
    }
}

float quantize_wide(const float* x, size_t k, int8_t* q, int32_t* exponent, int32_t* sum16) {
    __m512 highest = _mm512_setzero_ps();
    for (size_t g = 0; g < k / kWideGroup; g++) {
        const __m512 top = largest<4>(x + g * kWideGroup);
        exponent[g] = int32_t(bits_of(_mm512_reduce_max_ps(top)));
        highest = _mm512_max_ps(highest, top);
    }
    const float max = _mm512_reduce_max_ps(highest);
    const int32_t top = int32_t(bits_of(max));
    const __m512 inverse = _mm512_set1_ps(max >= kLeastActivation ? 127.0f / max : 0);
    for (size_t g = 0; g < k / kWideGroup; g++, x += kWideGroup, q += kWideGroup, sum16 += 4) {
        const int down = lower_exponent(top, exponent + g);
        quantize_group<4>(x, _mm512_scalef_ps(inverse, _mm512_set1_ps(float(down))), q, sum16);
    }
    return max / 127.0f * kExponentUnit;
}

void to_f16(const float* x, size_t n, uint16_t* y) {
    const __m512 high = _mm512_set1_ps(65504.0f), low = _mm512_set1_ps(-65504.0f);
    for (size_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_max_ps(low, _mm512_min_ps(high, _mm512_loadu_ps(x + i)));   // in this order NaN stays
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
}

// 2^(n + r) for a whole n and r in [-1/2, 1/2]: a minimax polynomial, relative error < 2e-7.
INLINE __m512 power_of_two(__m512 n, __m512 r) {
    __m512 p = _mm512_set1_ps(1.32647273e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.67151299e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55073358e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40222424e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147004e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// 2^x; below -126 it stays at 2^-126.
INLINE __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 n = _mm512_roundscale_ps(x, 0);
    return power_of_two(n, _mm512_sub_ps(x, n));
}

// exp(x), x <= about 88. The second constant is what log2 e is beyond the first.
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.3f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269502f)), 0);
    const __m512 r = _mm512_fmsub_ps(x, _mm512_set1_ps(1.44269502f), n);
    return power_of_two(n, _mm512_fmadd_ps(x, _mm512_set1_ps(1.92596304e-8f), r));
}

INLINE __mmask16 tail_mask(size_t left) { return left >= 16 ? 0xffff : __mmask16((1u << left) - 1); }

void rms_norm(const float* x, const float* weight, size_t n, float eps, float* y) {
    __m512 squares = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(tail_mask(n - i), x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / float(n) + eps));
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 mask = tail_mask(n - i);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + i)));
    }
}

void silu_mul(const float* gate, const float* up, size_t n, float* y) {
    const __m512 one = _mm512_set1_ps(1), limit = _mm512_set1_ps(88.0f);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 mask = tail_mask(n - i);
        const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        const __m512 e = exponential(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), limit));
        const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, e));
        _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, up + i), silu));
    }
}

void blend(float alpha, float* x, float beta, const float* y, size_t n) {
    const __m512 a = _mm512_set1_ps(alpha), b = _mm512_set1_ps(beta);
    for (size_t i = 0; i < n; i += 16)
        _mm512_storeu_ps(x + i, _mm512_fmadd_ps(b, _mm512_loadu_ps(y + i), _mm512_mul_ps(a, _mm512_loadu_ps(x + i))));
}

// What both kinds of softmax share. kAll: every score is inside; kScaled: weights are multiplied with their scales, and the
// largest product is returned in `unit`.
template <bool kAll, bool kScaled>
INLINE Softmax weigh(float* s, const float* scale, size_t n, size_t first, size_t last) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i begin = _mm512_set1_epi32(int(first)), end = _mm512_set1_epi32(int(last));
    const auto inside = [&](size_t i) __attribute__((always_inline)) {
        if constexpr (kAll) return __mmask16(0xffff);
        const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(int(i)), lane);
        return _mm512_kand(_mm512_cmpge_epi32_mask(index, begin), _mm512_cmplt_epi32_mask(index, end));
    };
    __m512 top[2];   // scores come in multiples of 32
    top[0] = top[1] = _mm512_set1_ps(-__builtin_inff());
    for (size_t i = 0; i < n; i += 32)
        UNROLL for (int h = 0; h < 2; h++)
            top[h] = _mm512_mask_max_ps(top[h], inside(i + 16 * h), top[h], _mm512_loadu_ps(s + i + 16 * h));
    const float max = _mm512_reduce_max_ps(_mm512_max_ps(top[0], top[1]));
    const __m512 shift = _mm512_set1_ps(max);
    __m512 total = _mm512_setzero_ps(), largest[2];
    largest[0] = largest[1] = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 32) {
        UNROLL for (int h = 0; h < 2; h++) {
            float* at = s + i + 16 * h;
            __m512 p = _mm512_maskz_mov_ps(inside(i + 16 * h), power_of_two(_mm512_sub_ps(_mm512_loadu_ps(at), shift)));
            total = _mm512_add_ps(total, p);
            if constexpr (kScaled) {
                p = _mm512_mul_ps(p, _mm512_loadu_ps(scale + i + 16 * h));
                largest[h] = _mm512_max_ps(largest[h], p);
            }
            _mm512_storeu_ps(at, p);
        }
    }
    return {max, _mm512_reduce_add_ps(total), kScaled ? _mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1])) : 1.0f};
}

Softmax softmax(float* s, size_t n, size_t first, size_t last) {
    return first == 0 && last == n ? weigh<true, false>(s, nullptr, n, first, last) : weigh<false, false>(s, nullptr, n, first, last);
}

Softmax quantized_softmax(float* s, const float* scale, size_t n, size_t first, size_t last, uint8_t* high, uint8_t* low) {
    Softmax result = first == 0 && last == n ? weigh<true, true>(s, scale, n, first, last) : weigh<false, true>(s, scale, n, first, last);
    const __m512 inverse = _mm512_set1_ps(result.unit > 0 ? 16383.0f / result.unit : 0);
    // Packing puts numbers of both vectors, and of both planes, by turns into lanes of 128 bits: back into order by fours.
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (size_t i = 0; i < n; i += 32) {
        __m512i q[2];
        UNROLL for (int h = 0; h < 2; h++) q[h] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(s + i + 16 * h), inverse));
        const __m512i words = _mm512_packus_epi32(q[0], q[1]);
        const __m512i planes = _mm512_packus_epi16(_mm512_srli_epi16(words, 7), _mm512_and_si512(words, _mm512_set1_epi16(127)));
        const __m512i ordered = _mm512_permutexvar_epi32(order, planes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i), _mm512_castsi512_si256(ordered));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i), _mm512_extracti64x4_epi64(ordered, 1));
    }
    result.unit /= 16383.0f;
    return result;
}

uint64_t spin_int8(uint64_t iterations) {
    __m512i acc[12], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
    UNROLL for (int i = 0; i < 12; i++) acc[i] = _mm512_set1_epi32(i);
    for (uint64_t n = 0; n < iterations; n++) {
        UNROLL for (int i = 0; i < 12; i++) acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
        asm volatile("" : "+v"(a), "+v"(b));
    }
    volatile int sink = 0;
    UNROLL for (int i = 0; i < 12; i++) sink = sink + _mm512_reduce_add_epi32(acc[i]);
    return iterations * 12 * 128;
}

uint64_t read_bytes(const uint8_t* data, size_t bytes) {
    __m512i sum[8];
    UNROLL for (int j = 0; j < 8; j++) sum[j] = _mm512_setzero_si512();
    for (size_t i = 0; i + 512 <= bytes; i += 512) {
        UNROLL for (int j = 0; j < 8; j++) sum[j] = _mm512_xor_si512(sum[j], load(data + i + 64 * j));
    }
    UNROLL for (int j = 1; j < 8; j++) sum[0] = _mm512_xor_si512(sum[0], sum[j]);
    return uint64_t(_mm512_reduce_add_epi64(sum[0]));
}

}  // namespace

const Ops& ops_avx512() {
    static const Ops table = {
        "avx512",
        kMaxTileRows,
        {nullptr, nullptr, nullptr, tile<Kind::Q8_0>, tile<Kind::Q4_0>, tile<Kind::Q4_1>, tile<Kind::Q5_0>,
         tile<Kind::Q5_1>, tile<Kind::Q4_K>, tile<Kind::Q5_K>, tile<Kind::Q6_K>, tile<Kind::IQ4_NL>, tile<Kind::NL4>},
        {panel<Element::F32>, panel<Element::F16>, panel<Element::BF16>},
        values<8>, values<4>,
        quantize_row, quantize_wide, quantize_vector, to_f16, rms_norm, silu_mul, blend, softmax, quantized_softmax, spin_int8, read_bytes,
    };
    return table;
}

}  // namespace miniphi
