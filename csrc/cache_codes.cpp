#include "cache_codes.h"

#include <array>

#include "blocks.h"
#include "vectors.h"

namespace miniphi {
namespace {

// kLevelsIQ4NL's nearest index for every value of -128 .. 127.
constexpr std::array<uint8_t, 256> nearest_codes() {
    std::array<uint8_t, 256> nearest{};
    for (int value = -128; value < 128; value++) {
        int best = 0;
        for (int code = 1; code < 16; code++) {
            const int distance = value > kLevelsIQ4NL[code] ? value - kLevelsIQ4NL[code] : kLevelsIQ4NL[code] - value;
            const int least = value > kLevelsIQ4NL[best] ? value - kLevelsIQ4NL[best] : kLevelsIQ4NL[best] - value;
            if (distance < least) best = code;
        }
        nearest[size_t(value + 128)] = uint8_t(best);
    }
    return nearest;
}

// (a, b) -> (a + b, a - b) for lanes kWidth apart.
template <int kWidth>
INLINE Floats butterfly(Floats x) {
    const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7};
#if defined(__clang__)
    const Floats other = __builtin_shufflevector(x, x, 0 ^ kWidth, 1 ^ kWidth, 2 ^ kWidth, 3 ^ kWidth, 4 ^ kWidth, 5 ^ kWidth,
                                                 6 ^ kWidth, 7 ^ kWidth);
#else
    const Floats other = __builtin_shuffle(x, lane ^ kWidth);
#endif
    return (lane & kWidth) != 0 ? other - x : other + x;
}

// The value of largest magnitude.
INLINE float standing_out(const float* x, size_t n) {
    Floats low{}, high{};
    for (size_t i = 0; i < n; i += kLanes) {
        low = smaller(load(x + i), low);
        high = larger(load(x + i), high);
    }
    float least = 0, most = 0;
    for (size_t lane = 0; lane < kLanes; lane++) {
        if (low[lane] < least) least = low[lane];
        if (high[lane] > most) most = high[lane];
    }
    return -least > most ? least : most;
}

// To the nearest whole numbers within bounds, halves to even: 1.5 * 2^23 leaves no room for a fraction. NaN becomes low.
INLINE Integers rounded(Floats x, float low, float high) {
    constexpr float kShift = 12582912.0f;
    const Floats within = smaller(larger(x, Floats{} + low), Floats{} + high);
    return __builtin_convertvector(within + kShift - kShift, Integers);
}

// Least squares: the scale with which values come nearest to what they stand for.
struct Fit {
    Floats product{}, square{};
    INLINE void add(Floats x, Floats value) {
        product += x * value;
        square += value * value;
    }
    INLINE float scale() const {
        float products = 0, squares = 0;
        for (size_t lane = 0; lane < kLanes; lane++) {
            products += product[lane];
            squares += square[lane];
        }
        return squares > 0 ? products / squares : 0;
    }
};

}  // namespace

WIDE_CLONE void hadamard(float* x, size_t n) {
    for (float* group = x; group < x + n; group += 32) {
        const Floats a = load(group), b = load(group + 8), c = load(group + 16), d = load(group + 24);
        const Floats e = a + c, f = b + d, g = a - c, h = b - d;
        const Floats wide[4] = {e + f, e - f, g + h, g - h};
        for (size_t i = 0; i < 4; i++)
            store(group + i * kLanes, butterfly<1>(butterfly<2>(butterfly<4>(wide[i]))) * 0.17677669529663687f);   // 1 / sqrt(32)
    }
}

// The value that stands out takes the outermost code of its sign: scales are positive.
WIDE_CLONE float quantize_non_linear(const float* x, size_t n, uint8_t* codes) {
    static constexpr std::array<uint8_t, 256> nearest = nearest_codes();
    const float top = standing_out(x, n), inverse = top > 0 ? 113.0f / top : top < 0 ? -127.0f / top : 0;
    Fit fit;
    for (size_t i = 0; i < n; i += kLanes) {
        const Integers whole = rounded(load(x + i) * inverse, -127, 127);
        int32_t at[kLanes];
        std::memcpy(at, &whole, sizeof at);
        float value[kLanes];
        for (size_t lane = 0; lane < kLanes; lane++) {
            codes[i + lane] = nearest[size_t(at[lane] + 128)];
            value[lane] = kLevelsIQ4NL[codes[i + lane]];
        }
        fit.add(load(x + i), load(value));
    }
    return fit.scale();
}

// The value that stands out becomes 0, that is -16.
WIDE_CLONE float quantize_5_bits(const float* x, size_t n, uint8_t* codes) {
    const float top = standing_out(x, n), inverse = top != 0 ? -16.0f / top : 0;
    Fit fit;
    for (size_t i = 0; i < n; i += kLanes) {
        const Integers whole = rounded(load(x + i) * inverse, -16, 15);
        const Bytes narrow = __builtin_convertvector(whole + 16, Bytes);
        std::memcpy(codes + i, &narrow, sizeof narrow);
        fit.add(load(x + i), __builtin_convertvector(whole, Floats));
    }
    return fit.scale();
}

}  // namespace miniphi
