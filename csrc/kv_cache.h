// The paged key/value cache.
//
// A block holds 32 tokens of every head. Eight blocks with neighbouring numbers are an *extent*, up to eight kv heads are
// *together*: [layer][extent][heads together] is contiguous and holds K of these heads, then V's scales, then V; within
// each, head after head; within a head, block beside block. A few queries read a sequence whose blocks were handed out in
// order as one stream, from the first byte of a layer to the last. Memory serves single blocks half as fast: at every jump
// some 20 KB were fetched ahead in vain.
//
//   F32, F16   K as a panel [head_dim][32 tokens], V as panels [head_dim / 32][32 tokens][32 dims]
//   Q8, Q4     K as a column block of blocks.h whose 32 rows are the tokens: Q8_0 or Q5_0, one scale per token and 32 dims;
//              V as panels [head_dim / 32] with roles exchanged (32 dims are the rows, 32 tokens the depth): signed int8
//              or codes of kLevelsIQ4NL; then one f16 scale per token.
//
// So scores are a quantised tile or a panel product over K, and outputs one over V. Q4 keeps keys and values rotated by a
// Hadamard matrix in groups of 32 dims, which spreads a channel that stands out over its neighbours; queries are rotated
// alike, outputs back. Its keys take 5 bits: an error there moves every weight, and at 4 bits is four fifths of the harm.
#pragma once
#include "matmul.h"

namespace miniphi {

constexpr size_t kCacheBlock = 32;     // tokens; kernels/__init__.py::KV_BLOCK_SIZE
constexpr size_t kExtentBlocks = 8;
constexpr size_t kMaxHeadsTogether = 8;

enum class CacheType : int { F32, F16, Q8, Q4 };
constexpr int kNumCacheTypes = 4;

// What attention and the cache need to know of the model.
struct HeadShape {
    size_t num_layers, num_heads, num_kv_heads, head_dim, rotary_dim;
    size_t window;   // a query sees keys at distance < window; 0 = all
    size_t group() const { return num_heads / num_kv_heads; }
    size_t padded_dim() const { return (head_dim + 31) / 32 * 32; }
    size_t query_width() const { return num_heads * head_dim; }
    size_t kv_width() const { return num_kv_heads * head_dim; }
};

class KvCache {
public:
    KvCache(const HeadShape& shape, CacheType type, size_t num_blocks);
    static size_t head_bytes(const HeadShape& shape, CacheType type);   // of one kv head of one block of one layer

    CacheType type() const { return type_; }
    bool is_quantized() const { return type_ == CacheType::Q8 || type_ == CacheType::Q4; }
    size_t num_blocks() const { return num_blocks_; }
    size_t heads_together() const { return heads_together_; }   // a divisor of num_kv_heads
    // One kv head of one block. Every part is a multiple of 64 bytes.
    struct Head {
        uint8_t *keys = nullptr, *values = nullptr, *scales = nullptr;   // scales: of V, in the quantised types
    };
    Head head(size_t layer, size_t block, size_t kv_head) const;
    Head next(const Head& head) const;   // the head after it, of the same block, where the two lie together
    size_t value_stride() const { return kExtentBlocks * value_panel_bytes_; }   // from one panel of a head's V to the next
    Kind key_kind() const;   // the format of K: what its tile or panel kernel is called

    // Write the key and value of one token, head_dim floats each.
    void put(const Ops& ops, const Head& head, size_t slot, const float* key, const float* value) const;

private:
    void put_quantized(const Ops& ops, const Head& head, size_t slot, const float* key, const float* value) const;

    const HeadShape shape_;
    const CacheType type_;
    const size_t num_blocks_, num_extents_, heads_together_, key_bytes_, value_panel_bytes_;
    Memory memory_;
};

}  // namespace miniphi
