// Codes of the Q4 cache: a rotation that spreads what stands out, and values in 4 and 5 bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace miniphi {

// x[n] times the orthonormal Hadamard matrix in groups of 32; its own inverse. n is a multiple of 32, below as well.
void hadamard(float* x, size_t n);
// n values as indices into kLevelsIQ4NL; returns their scale.
float quantize_non_linear(const float* x, size_t n, uint8_t* codes);
// n values as 0 .. 31 around 16; returns their scale.
float quantize_5_bits(const float* x, size_t n, uint8_t* codes);

}  // namespace miniphi
