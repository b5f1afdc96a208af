// AVX2 with FMA and F16C (Haswell and later).
//
// tile      as in ops_avx512.cpp, 16 columns and up to three rows at a time, or 8 columns and up to six rows where codes
//           cost more to unpack: sixteen registers hold no more. VPMADDUBSW multiplies u8 codes with s8 activations into
//           saturating 16-bit pairs; codes of 4, 5, 6 bits may add 8, 4, 2 of them before 16 bits overflow
//           (15 * 127 * 2 * 8 = 30480). Codes of 8 bits and non-linear ones are signed and their sign moves to the
//           activations: 128 * 127 * 2 = 32512 still fits.
#include <immintrin.h>

#include "half.h"
#include "ops.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace miniphi {
namespace {

INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE __m256 load_half(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
INLINE __m256 small_unsigned(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
INLINE __m256 small_signed(const void* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}

constexpr int kTileRows = 6;

// Codes of 8 bits and what non-linear codes stand for are multiplied as signed values, without a zero point.
constexpr bool is_signed(Kind kind) { return layout_of(kind).bits == 8 || layout_of(kind).levels != nullptr; }

// Codes of step kStep for the 8 rows at vector offset `lane` (0 or 32 bytes) of half `half`.
template <Kind kKind, int kStep>
INLINE __m256i codes_of(const uint8_t* w, int half, int lane) {
    constexpr Layout layout = layout_of(kKind);
    constexpr int kBits = layout.bits;
    w += half * 64 + lane;
    __m256i v = load(w + layout.code_offset(kStep));
    if constexpr (kBits == 8) {
        return _mm256_xor_si256(v, _mm256_set1_epi8(char(0x80)));
    } else {
        if constexpr (kStep % 2) v = _mm256_srli_epi16(v, 4);
        v = _mm256_and_si256(v, _mm256_set1_epi8(15));
        if constexpr (constexpr const int8_t* levels = layout_of(kKind).levels; levels != nullptr)
            return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels))), v);
        if constexpr (kBits > 4) {
            constexpr int shift = layout.high_shift(kStep) - 4;
            __m256i high = load(w + layout.high_offset(kStep));
            if constexpr (shift > 0) high = _mm256_srli_epi16(high, shift);
            if constexpr (shift < 0) high = _mm256_slli_epi16(high, -shift);
            v = _mm256_or_si256(v, _mm256_and_si256(high, _mm256_set1_epi8(kBits == 5 ? 0x10 : 0x30)));
        }
        return v;
    }
}

template <Kind kKind, int kRows, int kVectors, int kFirst, int kCount>
INLINE void multiply_steps(const uint8_t* w, int half, int lane, const int8_t* const* q, size_t k, __m256i (*pairs)[kVectors]) {
    if constexpr (kCount > 0) {
        __m256i c[kVectors];
        UNROLL for (int v = 0; v < kVectors; v++) c[v] = codes_of<kKind, kFirst>(w, half, lane + 32 * v);
        UNROLL for (int m = 0; m < kRows; m++) {
            int32_t four;
            __builtin_memcpy(&four, q[m] + k + 4 * kFirst, 4);
            const __m256i a = _mm256_set1_epi32(four);
            UNROLL for (int v = 0; v < kVectors; v++) {
                __m256i product;
                if constexpr (is_signed(kKind)) product = _mm256_maddubs_epi16(_mm256_abs_epi8(c[v]), _mm256_sign_epi8(a, c[v]));
                else product = _mm256_maddubs_epi16(c[v], a);
                pairs[m][v] = _mm256_add_epi16(pairs[m][v], product);
            }
        }
        multiply_steps<kKind, kRows, kVectors, kFirst + 1, kCount - 1>(w, half, lane, q, k, pairs);
    }
}

// dot += products of steps [kFirst, kLast), widened to 32 bits as often as the code width demands.
template <Kind kKind, int kRows, int kVectors, int kFirst, int kLast>
INLINE void dot_steps(const uint8_t* w, int half, int lane, const int8_t* const* q, size_t k, __m256i (*dot)[kVectors]) {
    if constexpr (kFirst < kLast) {
        constexpr int kBits = layout_of(kKind).bits;
        constexpr int safe = is_signed(kKind) ? 1 : kBits == 4 ? 8 : kBits == 5 ? 4 : 2;
        constexpr int count = safe < kLast - kFirst ? safe : kLast - kFirst;
        __m256i pairs[kRows][kVectors];
        UNROLL for (int m = 0; m < kRows; m++) UNROLL for (int v = 0; v < kVectors; v++) pairs[m][v] = _mm256_setzero_si256();
        multiply_steps<kKind, kRows, kVectors, kFirst, count>(w, half, lane, q, k, pairs);
        UNROLL for (int m = 0; m < kRows; m++) {
            UNROLL for (int v = 0; v < kVectors; v++) {
                dot[m][v] = _mm256_add_epi32(dot[m][v], _mm256_madd_epi16(pairs[m][v], _mm256_set1_epi16(1)));
                asm("" : "+x"(dot[m][v]));   // else the compiler keeps all products, in memory, and adds them as a tree
            }
        }
        dot_steps<kKind, kRows, kVectors, kFirst + count, kLast>(w, half, lane, q, k, dot);
    }
}

INLINE __m256 times(__m256 d, float scale) { return _mm256_mul_ps(d, _mm256_set1_ps(scale)); }
INLINE __m256 times(__m256 d, int32_t exponent) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(d), _mm256_set1_epi32(exponent)));
}

// Columns [first, first + 8 kVectors) of a tile.
template <Kind kKind, int kRows, int kVectors>
INLINE void tile_part(const uint8_t* w, Prefetch prefetch, int first, const QuantRows& a, size_t row, float* y, size_t y_stride, bool add) {
    const int half = first / 16, lane = first % 16 * 4;
    constexpr Layout layout = layout_of(kKind);
    constexpr bool has_zero = layout.zero != 0 && !is_signed(kKind);
    constexpr int parts = layout.scale == Scale::SuperHalf ? 2 : 1;
    const int8_t* q[kRows];
    const float *scale[kRows], *scaled_sum[kRows];
    const int32_t *correction[kRows], *exponent[kRows];
    __m256 sum[kRows][kVectors];
    UNROLL for (int m = 0; m < kRows; m++) {
        q[m] = a.q + (row + m) * a.q_stride;
        scale[m] = a.scale + (row + m) * a.scale_stride;
        scaled_sum[m] = a.scaled_sum + (row + m) * a.scale_stride;
        correction[m] = a.correction + (row + m) * a.correction_stride;
        exponent[m] = a.exponent + (row + m) * a.groups;
        UNROLL for (int v = 0; v < kVectors; v++)
            sum[m][v] = add && !layout.is_wide() ? _mm256_loadu_ps(y + m * y_stride + first + 8 * v) : _mm256_setzero_ps();
    }
    const uint8_t* super = w;
    for (size_t g = 0; g < a.groups; g++) {
        asm("" : "+r"(prefetch.lines));   // else every bit is kept apart, in memory
        for (size_t i = 0; i < layout.group_bytes / 64; i++)
            if (prefetch.lines & (1u << i)) _mm_prefetch(reinterpret_cast<const char*>(prefetch.next) + 64 * i, _MM_HINT_T1);
        prefetch.next += layout.group_bytes;
        if constexpr (layout.super_bytes > 0) {
            if (g % kSuperGroups == 0) {
                super = w;
                w += layout.super_bytes;
            }
        }
        const uint8_t* scales = w + layout.scale_offset();
        UNROLL for (int part = 0; part < parts; part++) {
            __m256i dot[kRows][kVectors];
            UNROLL for (int m = 0; m < kRows; m++)
                UNROLL for (int v = 0; v < kVectors; v++)
                    dot[m][v] = has_zero ? _mm256_set1_epi32(correction[m][g * parts + part]) : _mm256_setzero_si256();
            if constexpr (parts == 1) {
                dot_steps<kKind, kRows, kVectors, 0, layout.steps()>(w, half, lane, q, g * layout.group, dot);
            } else {
                if (part == 0) dot_steps<kKind, kRows, kVectors, 0, 4>(w, half, lane, q, g * kGroup, dot);
                else dot_steps<kKind, kRows, kVectors, 4, 8>(w, half, lane, q, g * kGroup, dot);
            }
            UNROLL for (int v = 0; v < kVectors; v++) {
                const int n = first + 8 * v;
                __m256 d;
                if constexpr (layout.scale == Scale::Super) d = _mm256_mul_ps(load_half(super + 2 * n), small_unsigned(scales + n));
                else if constexpr (layout.scale == Scale::SuperHalf)
                    d = _mm256_mul_ps(load_half(super + 2 * n), small_signed(scales + 32 * part + n));
                else d = load_half(scales + 2 * n);
                UNROLL for (int m = 0; m < kRows; m++) {
                    __m256 factor;
                    if constexpr (layout.is_wide()) factor = times(d, exponent[m][g]);
                    else factor = times(d, scale[m][g]);
                    sum[m][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m][v]), factor, sum[m][v]);
                }
            }
        }
        if constexpr (layout.scale == Scale::Minimum || layout.scale == Scale::Super) {
            UNROLL for (int v = 0; v < kVectors; v++) {
                const int n = first + 8 * v;
                __m256 minimum;
                if constexpr (layout.scale == Scale::Minimum) minimum = load_half(scales + 64 + 2 * n);
                else minimum = _mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(load_half(super + 64 + 2 * n), small_unsigned(scales + 32 + n)));
                UNROLL for (int m = 0; m < kRows; m++)
                    sum[m][v] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(scaled_sum[m][g]), sum[m][v]);
            }
        }
        w += layout.group_bytes;
    }
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int v = 0; v < kVectors; v++) {
            float* to = y + m * y_stride + first + 8 * v;
            if constexpr (layout.is_wide())
                sum[m][v] = _mm256_fmadd_ps(sum[m][v], _mm256_set1_ps(*scale[m]), add ? _mm256_loadu_ps(to) : _mm256_setzero_ps());
            _mm256_storeu_ps(to, sum[m][v]);
        }
    }
}

template <Kind kKind, int kRows>
void tile_rows(const uint8_t* w, Prefetch prefetch, const QuantRows& a, size_t row, float* y, size_t y_stride, bool add) {
    constexpr int kVectors = kRows > 3 ? 1 : 2;
    for (int first = 0; first < 32; first += 8 * kVectors, prefetch.lines = 0)
        tile_part<kKind, kRows, kVectors>(w, prefetch, first, a, row, y, y_stride, add);
}

template <Kind kKind>
void tile(const uint8_t* block, Prefetch prefetch, const QuantRows& a, size_t row, int num_rows, float* y, size_t y_stride,
          bool add) {
    constexpr int kMost = is_signed(kKind) ? kTileRows : kTileRows / 2;
    while (num_rows > 0) {
        const int rows = num_rows > kMost ? (num_rows + 1) / 2 : num_rows;
        switch (rows) {
            case 1: tile_rows<kKind, 1>(block, prefetch, a, row, y, y_stride, add); break;
            case 2: tile_rows<kKind, 2>(block, prefetch, a, row, y, y_stride, add); break;
            case 3: tile_rows<kKind, 3>(block, prefetch, a, row, y, y_stride, add); break;
            default:
                if constexpr (kMost > 3) {
                    if (rows == 4) tile_rows<kKind, 4>(block, prefetch, a, row, y, y_stride, add);
                    else if (rows == 5) tile_rows<kKind, 5>(block, prefetch, a, row, y, y_stride, add);
                    else tile_rows<kKind, 6>(block, prefetch, a, row, y, y_stride, add);
                }
        }
        row += rows;
        y += rows * y_stride;
        num_rows -= rows;
        prefetch.lines = 0;
    }
}

enum class Element { F32, F16, BF16 };

template <Element kElement>
INLINE __m256 load_panel(const void* panel, size_t index) {
    if constexpr (kElement == Element::F32) return _mm256_loadu_ps(static_cast<const float*>(panel) + index);
    if constexpr (kElement == Element::F16) return load_half(static_cast<const uint16_t*>(panel) + index);
    const void* p = static_cast<const uint16_t*>(panel) + index;
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

template <Element kElement, int kRows>
INLINE void panel_half(const float* a, size_t a_stride, const void* panel, size_t first, size_t depth, float* c,
                       size_t c_stride, bool add) {
    __m256 sum[kRows][2];
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int v = 0; v < 2; v++)
            sum[m][v] = add ? _mm256_loadu_ps(c + m * c_stride + first + 8 * v) : _mm256_setzero_ps();
    }
    for (size_t k = 0; k < depth; k++) {
        const __m256 p0 = load_panel<kElement>(panel, k * kBlockColumns + first);
        const __m256 p1 = load_panel<kElement>(panel, k * kBlockColumns + first + 8);
        UNROLL for (int m = 0; m < kRows; m++) {
            const __m256 x = _mm256_broadcast_ss(a + m * a_stride + k);
            sum[m][0] = _mm256_fmadd_ps(x, p0, sum[m][0]);
            sum[m][1] = _mm256_fmadd_ps(x, p1, sum[m][1]);
        }
    }
    UNROLL for (int m = 0; m < kRows; m++) {
        UNROLL for (int v = 0; v < 2; v++) _mm256_storeu_ps(c + m * c_stride + first + 8 * v, sum[m][v]);
    }
}

template <Element kElement>
void panel(const float* a, size_t a_stride, int num_rows, const void* data, size_t depth, float* c, size_t c_stride,
           bool add) {
    while (num_rows > 0) {
        const int rows = num_rows >= 4 ? 4 : num_rows;
        for (size_t first = 0; first < kBlockColumns; first += 16) {
            switch (rows) {
                case 4: panel_half<kElement, 4>(a, a_stride, data, first, depth, c, c_stride, add); break;
                case 3: panel_half<kElement, 3>(a, a_stride, data, first, depth, c, c_stride, add); break;
                case 2: panel_half<kElement, 2>(a, a_stride, data, first, depth, c, c_stride, add); break;
                default: panel_half<kElement, 1>(a, a_stride, data, first, depth, c, c_stride, add); break;
            }
        }
        a += rows * a_stride;
        c += rows * c_stride;
        num_rows -= rows;
    }
}

// Signed values of step s for 8 dims, byte offset `lane` of the step's 128, of a panel of V.
template <int kBits>
INLINE __m256i values_at(const uint8_t* panel, int s, int lane) {
    if constexpr (kBits == 8) return load(panel + s * 128 + lane);
    __m256i v = load(panel + s / 2 * 128 + lane);
    if (s % 2) v = _mm256_srli_epi16(v, 4);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevelsIQ4NL)));
    return _mm256_shuffle_epi8(table, _mm256_and_si256(v, _mm256_set1_epi8(15)));
}

// 8 dims at a time; weights of at most 127 leave room for one pair of products in 16 bits.
template <int kBits>
void values(const uint8_t* const* panels, size_t num_tokens, const WeightPlanes& p, int num_rows,
            const float* scale, float* c, size_t c_stride) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int row = 0; row < num_rows; row++) {
        for (int lane = 0; lane < 128; lane += 32) {
            __m256i high = _mm256_setzero_si256(), low = high;
            for (size_t b = 0; 32 * b < num_tokens; b++) {
                UNROLL for (int s = 0; s < 8; s++) {
                    const __m256i v = values_at<kBits>(panels[b], s, lane);
                    int32_t four[2];
                    __builtin_memcpy(four, p.high + row * p.stride + 32 * b + 4 * s, 4);
                    __builtin_memcpy(four + 1, p.low + row * p.stride + 32 * b + 4 * s, 4);
                    high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi32(four[0]), v), ones));
                    low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi32(four[1]), v), ones));
                }
            }
            const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high, 7), low);
            _mm256_storeu_ps(c + row * c_stride + lane / 4, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale[row])));
        }
    }
}

INLINE __m256 absolute(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

INLINE float reduce_max(__m256 x) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

INLINE float reduce_add(__m256 x) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

// 16 values to int8 and their sum.
INLINE int32_t quantize16(const float* x, __m256 inverse, int8_t* q) {
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), inverse));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    const __m256i sum = _mm256_add_epi32(a, b);
    __m128i v = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}

INLINE float largest(const float* x, size_t n) {
    __m256 top = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 8) top = _mm256_max_ps(top, absolute(_mm256_loadu_ps(x + i)));
    return reduce_max(top);
}

float quantize_vector(const float* x, size_t n, int8_t* q) {
    const float max = largest(x, n);
    const __m256 inverse = _mm256_set1_ps(max >= kLeastActivation ? 127.0f / max : 0);
    for (size_t i = 0; i < n; i += 16) quantize16(x + i, inverse, q + i);
    return max / 127.0f;
}

void quantize_row(const float* x, size_t k, int8_t* q, float* scale, int32_t* sum16) {
    for (size_t g = 0; g < k / kGroup; g++, x += kGroup, q += kGroup, sum16 += 2) {
        const float max = largest(x, kGroup);
        const __m256 inverse = _mm256_set1_ps(max >= kLeastActivation ? 127.0f / max : 0);
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
        const __m256 factor = _mm256_set1_ps(inverse * float(1 << down));
        for (int h = 0; h < 4; h++) sum16[h] = quantize16(x + 16 * h, factor, q + 16 * h);
    }
    return max / 127.0f * kExponentUnit;
}

void to_f16(const float* x, size_t n, uint16_t* y) {
    const __m256 high = _mm256_set1_ps(65504.0f), low = _mm256_set1_ps(-65504.0f);
    for (size_t i = 0; i < n; i += 8) {
        const __m256 v = _mm256_max_ps(low, _mm256_min_ps(high, _mm256_loadu_ps(x + i)));   // in this order NaN stays
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
}

// 2^(n + r) for a whole n >= -126 and r in [-1/2, 1/2]; see ops_avx512.cpp.
INLINE __m256 power_of_two(__m256 n, __m256 r) {
    __m256 p = _mm256_set1_ps(1.32647273e-3f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(9.67151299e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.55073358e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(2.40222424e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(6.93147004e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

INLINE __m256 nearest(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

INLINE __m256 power_of_two(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-126.0f));
    const __m256 n = nearest(x);
    return power_of_two(n, _mm256_sub_ps(x, n));
}

INLINE __m256 exponential(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.3f));
    const __m256 n = nearest(_mm256_mul_ps(x, _mm256_set1_ps(1.44269502f)));
    const __m256 r = _mm256_fmsub_ps(x, _mm256_set1_ps(1.44269502f), n);
    return power_of_two(n, _mm256_fmadd_ps(x, _mm256_set1_ps(1.92596304e-8f), r));
}

// Lanes below n - i.
INLINE __m256i tail_mask(size_t left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(left)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

void rms_norm(const float* x, const float* weight, size_t n, float eps, float* y) {
    __m256 squares = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 8) {
        const __m256 v = _mm256_maskload_ps(x + i, tail_mask(n - i));
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    const __m256 inverse = _mm256_set1_ps(1.0f / __builtin_sqrtf(reduce_add(squares) / float(n) + eps));
    for (size_t i = 0; i < n; i += 8) {
        const __m256i mask = tail_mask(n - i);
        const __m256 v = _mm256_mul_ps(_mm256_maskload_ps(x + i, mask), inverse);
        _mm256_maskstore_ps(y + i, mask, _mm256_mul_ps(v, _mm256_maskload_ps(weight + i, mask)));
    }
}

void silu_mul(const float* gate, const float* up, size_t n, float* y) {
    const __m256 one = _mm256_set1_ps(1), limit = _mm256_set1_ps(88.0f);
    for (size_t i = 0; i < n; i += 8) {
        const __m256i mask = tail_mask(n - i);
        const __m256 g = _mm256_maskload_ps(gate + i, mask);
        const __m256 e = exponential(_mm256_min_ps(_mm256_sub_ps(_mm256_setzero_ps(), g), limit));
        const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, e));
        _mm256_maskstore_ps(y + i, mask, _mm256_mul_ps(_mm256_maskload_ps(up + i, mask), silu));
    }
}

void blend(float alpha, float* x, float beta, const float* y, size_t n) {
    const __m256 a = _mm256_set1_ps(alpha), b = _mm256_set1_ps(beta);
    for (size_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_fmadd_ps(b, _mm256_loadu_ps(y + i), _mm256_mul_ps(a, _mm256_loadu_ps(x + i))));
}

template <bool kScaled>   // as in ops_avx512.cpp
INLINE Softmax weigh(float* s, const float* scale, size_t n, size_t first, size_t last) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before = _mm256_set1_epi32(int(first) - 1), end = _mm256_set1_epi32(int(last));
    const auto inside = [&](size_t i) __attribute__((always_inline)) {
        const __m256i index = _mm256_add_epi32(_mm256_set1_epi32(int(i)), lane);
        return _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(index, before), _mm256_cmpgt_epi32(end, index)));
    };
    const __m256 lowest = _mm256_set1_ps(-__builtin_inff());
    __m256 top = lowest;
    for (size_t i = 0; i < n; i += 8) top = _mm256_max_ps(top, _mm256_blendv_ps(lowest, _mm256_loadu_ps(s + i), inside(i)));
    const float max = reduce_max(top);
    const __m256 shift = _mm256_set1_ps(max);
    __m256 total = _mm256_setzero_ps(), largest = total;
    for (size_t i = 0; i < n; i += 8) {
        __m256 p = _mm256_and_ps(inside(i), power_of_two(_mm256_sub_ps(_mm256_loadu_ps(s + i), shift)));
        total = _mm256_add_ps(total, p);
        if constexpr (kScaled) {
            p = _mm256_mul_ps(p, _mm256_loadu_ps(scale + i));
            largest = _mm256_max_ps(largest, p);
        }
        _mm256_storeu_ps(s + i, p);
    }
    return {max, reduce_add(total), kScaled ? reduce_max(largest) : 1.0f};
}

Softmax softmax(float* s, size_t n, size_t first, size_t last) { return weigh<false>(s, nullptr, n, first, last); }

// Four 32-bit numbers of one byte each, packed.
INLINE void store_bytes(__m256i x, uint8_t* to) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

Softmax quantized_softmax(float* s, const float* scale, size_t n, size_t first, size_t last, uint8_t* high, uint8_t* low) {
    Softmax result = weigh<true>(s, scale, n, first, last);
    const __m256 inverse = _mm256_set1_ps(result.unit > 0 ? 16383.0f / result.unit : 0);
    for (size_t i = 0; i < n; i += 8) {
        const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(s + i), inverse));
        store_bytes(_mm256_srli_epi32(q, 7), high + i);
        store_bytes(_mm256_and_si256(q, _mm256_set1_epi32(127)), low + i);
    }
    result.unit /= 16383.0f;
    return result;
}

uint64_t spin_int8(uint64_t iterations) {
    __m256i acc[8], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(1);
    UNROLL for (int i = 0; i < 8; i++) acc[i] = _mm256_set1_epi32(i);
    for (uint64_t n = 0; n < iterations; n++) {
        UNROLL for (int i = 0; i < 8; i++) {
            acc[i] = _mm256_add_epi16(acc[i], _mm256_maddubs_epi16(a, b));
            asm volatile("" : "+x"(a), "+x"(b));
        }
    }
    volatile int sink = 0;
    UNROLL for (int i = 0; i < 8; i++) sink = sink + _mm256_extract_epi32(acc[i], 0);
    return iterations * 8 * 64;
}

uint64_t read_bytes(const uint8_t* data, size_t bytes) {
    __m256i sum[8];
    UNROLL for (int j = 0; j < 8; j++) sum[j] = _mm256_setzero_si256();
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
        UNROLL for (int j = 0; j < 8; j++) sum[j] = _mm256_xor_si256(sum[j], load(data + i + 32 * j));
    }
    UNROLL for (int j = 1; j < 8; j++) sum[0] = _mm256_xor_si256(sum[0], sum[j]);
    return uint64_t(_mm256_extract_epi64(sum[0], 0));
}

}  // namespace

const Ops& ops_avx2() {
    static const Ops table = {
        "avx2",
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
