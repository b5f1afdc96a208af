// Vectors of floats that the compiler lowers to what the target has, for code that is worth more than plain loops and less
// than a file per instruction set. A function marked WIDE_CLONE is compiled twice. Lanes are added in the order in which
// the code says so, hence the results are the same bits everywhere.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE_CLONE __attribute__((target_clones("avx2", "default")))   // chosen when the library is loaded
#else
#define WIDE_CLONE
#endif

namespace miniphi {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(8)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
constexpr size_t kLanes = 8;

INLINE Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

}  // namespace miniphi
