// Scalar conversions between float and its 16-bit forms. Internal linkage on purpose: each file keeps its own copy.
#pragma once
#include <cstdint>
#include <cstring>

namespace miniphi {

static inline float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float from_bf16(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }

static inline float from_f16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) {   // zero and subnormal: mantissa * 2^-24
        const float value = float(mantissa) * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
    return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Round to nearest even; values beyond the range saturate at 65504.
static inline uint16_t to_f16_scalar(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x477fe000u) return uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00 : 0x7bff));
    if (magnitude < 0x38800000u) {   // subnormal: let the float adder round
        const float shifted = float_from_bits(magnitude) + 0.5f;
        return uint16_t(sign | (bits_of(shifted) - 0x3f000000u));
    }
    magnitude += 0xc8000fffu + ((magnitude >> 13) & 1);
    return uint16_t(sign | (magnitude >> 13));
}

}  // namespace miniphi
