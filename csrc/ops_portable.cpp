// Plain loops: what every other instruction set must match, and what runs where nothing better is known.
#include <algorithm>
#include <cmath>

#include "half.h"
#include "ops.h"

namespace miniphi {
namespace {

// What is multiplied for row n, step s, position kk in a group.
template <Kind kKind>
int code_at(const uint8_t* group, size_t s, int n, int kk) {
    constexpr Layout layout = layout_of(kKind);
    constexpr int kBits = layout.bits;
    group += n / 16 * 64 + n % 16 * 4 + kk;
    if constexpr (kBits == 8) return group[layout.code_offset(s)];
    int code = (group[layout.code_offset(s)] >> (4 * (s % 2))) & 15;
    if constexpr (kBits > 4) code |= ((group[layout.high_offset(s)] >> layout.high_shift(s)) & (kBits == 5 ? 1 : 3)) << 4;
    if constexpr (layout.levels != nullptr) return layout.levels[code] + layout.zero;
    return code;
}

template <Kind kKind>
void tile(const uint8_t* block, Prefetch, const QuantRows& a, size_t row, int num_rows, float* y, size_t y_stride,
          bool add) {
    constexpr Layout layout = layout_of(kKind);
    constexpr int halves = layout.scale == Scale::SuperHalf ? 2 : 1;
    for (int i = 0; i < num_rows; i++) {
        const int8_t* q = a.q + (row + i) * a.q_stride;
        const float* scale = a.scale + (row + i) * a.scale_stride;
        const int32_t* exponent = a.exponent + (row + i) * a.groups;
        const float* scaled_sum = a.scaled_sum + (row + i) * a.scale_stride;
        const int32_t* correction = a.correction + (row + i) * a.correction_stride;
        float sum[kBlockColumns];
        for (size_t n = 0; n < kBlockColumns; n++) sum[n] = add && !layout.is_wide() ? y[i * y_stride + n] : 0;
        const uint8_t* w = block;
        const uint16_t* super = nullptr;
        for (size_t g = 0; g < a.groups; g++) {
            if (layout.super_bytes && g % kSuperGroups == 0) {
                super = reinterpret_cast<const uint16_t*>(w);
                w += layout.super_bytes;
            }
            const uint8_t* scales = w + layout.scale_offset();
            const uint16_t* f16 = reinterpret_cast<const uint16_t*>(scales);
            for (int n = 0; n < int(kBlockColumns); n++) {
                for (int h = 0; h < halves; h++) {
                    int32_t dot = layout.zero ? correction[g * halves + h] : 0;
                    for (size_t s = h * layout.steps() / halves; s < (h + 1) * layout.steps() / halves; s++)
                        for (int kk = 0; kk < 4; kk++) dot += code_at<kKind>(w, s, n, kk) * q[g * layout.group + s * 4 + kk];
                    float d;
                    if (layout.scale == Scale::Super) d = from_f16(super[n]) * float(scales[n]);
                    else if (layout.scale == Scale::SuperHalf) d = from_f16(super[n]) * float(int8_t(scales[32 * h + n]));
                    else d = from_f16(f16[n]);
                    if constexpr (layout.is_wide()) sum[n] += float(dot) * float_from_bits(bits_of(d) + uint32_t(exponent[g]));
                    else sum[n] += float(dot) * (d * scale[g]);
                }
                if (layout.scale == Scale::Minimum) sum[n] += from_f16(f16[32 + n]) * scaled_sum[g];
                if (layout.scale == Scale::Super) sum[n] -= from_f16(super[32 + n]) * float(scales[32 + n]) * scaled_sum[g];
            }
            w += layout.group_bytes;
        }
        if constexpr (layout.is_wide())
            for (size_t n = 0; n < kBlockColumns; n++) sum[n] = scale[0] * sum[n] + (add ? y[i * y_stride + n] : 0);
        std::copy_n(sum, kBlockColumns, y + i * y_stride);
    }
}

template <typename T, float (*kLoad)(T)>
void panel(const float* a, size_t a_stride, int num_rows, const void* data, size_t depth, float* c, size_t c_stride,
           bool add) {
    const T* p = static_cast<const T*>(data);
    for (int i = 0; i < num_rows; i++) {
        float sum[kBlockColumns];
        for (size_t n = 0; n < kBlockColumns; n++) sum[n] = add ? c[i * c_stride + n] : 0;
        for (size_t k = 0; k < depth; k++)
            for (size_t n = 0; n < kBlockColumns; n++) sum[n] += a[i * a_stride + k] * kLoad(p[k * kBlockColumns + n]);
        std::copy_n(sum, kBlockColumns, c + i * c_stride);
    }
}

float load_f32(float x) { return x; }

template <int kBits>
void values(const uint8_t* const* panels, size_t num_tokens, const WeightPlanes& p, int num_rows,
            const float* scale, float* c, size_t c_stride) {
    for (int i = 0; i < num_rows; i++) {
        for (int n = 0; n < int(kBlockColumns); n++) {
            int32_t sum = 0;
            for (size_t t = 0; t < num_tokens; t++) {
                const int32_t weight = 128 * p.high[i * p.stride + t] + p.low[i * p.stride + t];
                const int s = int(t % 32) / 4, byte = n / 16 * 64 + n % 16 * 4 + int(t % 4);
                const uint8_t* panel = panels[t / 32];
                if (kBits == 8) sum += weight * int8_t(panel[s * 128 + byte]);
                else sum += weight * kLevelsIQ4NL[(panel[s / 2 * 128 + byte] >> (s % 2 * 4)) & 15];
            }
            c[i * c_stride + n] = float(sum) * scale[i];
        }
    }
}

float quantize_vector(const float* x, size_t n, int8_t* q) {
    float max = 0;
    for (size_t i = 0; i < n; i++) max = std::max(max, std::fabs(x[i]));
    const float inverse = max >= kLeastActivation ? 127.0f / max : 0;
    for (size_t i = 0; i < n; i++) q[i] = int8_t(std::nearbyint(x[i] * inverse));
    return max / 127.0f;
}

void add_sixteens(const int8_t* q, size_t k, int32_t* sum16) {
    for (size_t g = 0; g < k / 16; g++) {
        sum16[g] = 0;
        for (size_t i = 0; i < 16; i++) sum16[g] += q[g * 16 + i];
    }
}

void quantize_row(const float* x, size_t k, int8_t* q, float* scale, int32_t* sum16) {
    for (size_t g = 0; g < k / kGroup; g++) scale[g] = quantize_vector(x + g * kGroup, kGroup, q + g * kGroup);
    add_sixteens(q, k, sum16);
}

float quantize_wide(const float* x, size_t k, int8_t* q, int32_t* exponent, int32_t* sum16) {
    int32_t top = 0;
    for (size_t g = 0; g < k / kWideGroup; g++) {
        float max = 0;
        for (size_t i = 0; i < kWideGroup; i++) max = std::max(max, std::fabs(x[g * kWideGroup + i]));
        exponent[g] = int32_t(bits_of(max));
        top = std::max(top, exponent[g]);
    }
    const float max = float_from_bits(uint32_t(top)), inverse = max >= kLeastActivation ? 127.0f / max : 0;
    for (size_t g = 0; g < k / kWideGroup; g++) {
        const float factor = std::ldexp(inverse, lower_exponent(top, exponent + g));
        for (size_t i = g * kWideGroup; i < (g + 1) * kWideGroup; i++) q[i] = int8_t(std::nearbyint(x[i] * factor));
    }
    add_sixteens(q, k, sum16);
    return max / 127.0f * kExponentUnit;
}

void to_f16(const float* x, size_t n, uint16_t* y) {
    for (size_t i = 0; i < n; i++) y[i] = to_f16_scalar(x[i]);
}

void rms_norm(const float* x, const float* weight, size_t n, float eps, float* y) {
    float sum[16] = {}, total = 0;
    for (size_t i = 0; i < n; i++) sum[i % 16] += x[i] * x[i];
    for (float s : sum) total += s;
    const float inverse = 1.0f / std::sqrt(total / float(n) + eps);
    for (size_t i = 0; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

void silu_mul(const float* gate, const float* up, size_t n, float* y) {
    for (size_t i = 0; i < n; i++) y[i] = up[i] * gate[i] / (1.0f + std::exp(-gate[i]));
}

void blend(float alpha, float* x, float beta, const float* y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = alpha * x[i] + beta * y[i];
}

Softmax softmax(float* s, size_t n, size_t first, size_t last) {
    float max = -INFINITY, lanes[16] = {}, sum = 0;
    for (size_t i = first; i < last; i++) max = std::max(max, s[i]);
    for (size_t i = 0; i < n; i++) {
        s[i] = i >= first && i < last ? std::exp2(s[i] - max) : 0;
        lanes[i % 16] += s[i];
    }
    for (float lane : lanes) sum += lane;
    return {max, sum, 1};
}

Softmax quantized_softmax(float* s, const float* scale, size_t n, size_t first, size_t last, uint8_t* high, uint8_t* low) {
    Softmax result = softmax(s, n, first, last);
    float top = 0;
    for (size_t i = 0; i < n; i++) {
        s[i] *= scale[i];
        top = std::max(top, s[i]);
    }
    const float inverse = top > 0 ? 16383.0f / top : 0;
    for (size_t i = 0; i < n; i++) {
        const int q = int(std::nearbyint(s[i] * inverse));
        high[i] = uint8_t(q >> 7);
        low[i] = uint8_t(q & 127);
    }
    result.unit = top / 16383.0f;
    return result;
}

uint64_t spin_int8(uint64_t iterations) {
    volatile int32_t sink = 0;
    int32_t sum[64] = {};
    for (uint64_t i = 0; i < iterations; i++)
        for (int j = 0; j < 64; j++) sum[j] += int8_t(i) * int8_t(j);
    for (int32_t s : sum) sink = sink + s;
    return iterations * 128;
}

uint64_t read_bytes(const uint8_t* data, size_t bytes) {
    const uint64_t* words = reinterpret_cast<const uint64_t*>(data);
    uint64_t sum[8] = {};
    for (size_t i = 0; i + 8 <= bytes / 8; i += 8)
        for (int j = 0; j < 8; j++) sum[j] ^= words[i + j];
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

}  // namespace

const Ops& ops_portable() {
    static const Ops table = {
        "portable",
        kMaxTileRows,
        {nullptr, nullptr, nullptr, tile<Kind::Q8_0>, tile<Kind::Q4_0>, tile<Kind::Q4_1>, tile<Kind::Q5_0>,
         tile<Kind::Q5_1>, tile<Kind::Q4_K>, tile<Kind::Q5_K>, tile<Kind::Q6_K>, tile<Kind::IQ4_NL>, tile<Kind::NL4>},
        {panel<float, load_f32>, panel<uint16_t, from_f16>, panel<uint16_t, from_bf16>},
        values<8>, values<4>,
        quantize_row, quantize_wide, quantize_vector, to_f16, rms_norm, silu_mul, blend, softmax, quantized_softmax, spin_int8, read_bytes,
    };
    return table;
}

}  // namespace miniphi
