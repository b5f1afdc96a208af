// From stored rows (the GGUF block formats, or plain floats) to the column blocks of blocks.h, without loss.
#pragma once
#include "blocks.h"

namespace miniphi {

// Bytes of one stored row of `depth` values.
size_t stored_row_bytes(Kind kind, size_t depth);

// Write one column block. rows[i] points to stored row i; null rows (beyond the matrix's end) pack as zeros.
void pack_block(Kind kind, const uint8_t* const rows[kBlockColumns], size_t depth, uint8_t* block);

// Write row n's codes of one group, interleaved for 4-way dot products: four codes of a step are one 32-bit word.
void put_codes(const Layout& layout, size_t n, const uint8_t* codes, uint8_t* group);

// Dequantise column n of a packed block: y[depth], float32, equal to dequantising the stored row.
void unpack_column(Kind kind, const uint8_t* block, size_t n, size_t depth, float* y);

}  // namespace miniphi
