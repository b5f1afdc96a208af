// Paged key/value cache and causal attention over it.
//
// Cache: [layer][block][kv head] holds 32 tokens, contiguous: K as a panel [head_dim][32 tokens], V as panels
// [head_dim / 32][32 tokens][32]; for int8 the two scales of every token follow, float32 [2][32]. Both products of
// attention are then the panel kernel of ops.h: scores = q x K, output = p x V.
//
// One row of attention always means the same arithmetic, whatever comes with it: the context is cut at multiples of
// 256 positions; inside a chunk, scores -> max -> exp -> sum -> weighted values; chunks are merged in ascending order.
// A short query over a long context spreads its chunks over the threads and merges them afterwards.
#pragma once
#include <vector>

#include "matmul.h"

namespace miniphi {

constexpr size_t kCacheBlock = 32;     // tokens; kernels/__init__.py::KV_BLOCK_SIZE
constexpr size_t kChunkBlocks = 8;     // cache blocks in a chunk
constexpr size_t kChunk = kCacheBlock * kChunkBlocks;

enum class CacheType : int { F32, F16, Q8 };

// What attention and the cache need to know of the model.
struct HeadShape {
    size_t num_layers, num_heads, num_kv_heads, head_dim, rotary_dim;
    size_t window;   // a query sees keys at distance < window; 0 = all
    size_t group() const { return num_heads / num_kv_heads; }
    size_t padded_dim() const { return (head_dim + 31) / 32 * 32; }
    size_t query_width() const { return num_heads * head_dim; }
    size_t kv_width() const { return num_kv_heads * head_dim; }
};

// One step's sequences, as the program hands them on. Arrays are those of engine/batch.py.
struct Sequences {
    size_t num_tokens, num_sequences, max_blocks;
    const int32_t* positions;       // [num_tokens]
    const int32_t* query_starts;    // [num_sequences + 1]
    const int32_t* context_lens;    // [num_sequences]
    const int32_t* block_tables;    // [num_sequences][max_blocks]
    const float *cos, *sin;         // [num_tokens][rotary_dim / 2]
};

class KvCache {
public:
    KvCache(const HeadShape& shape, CacheType type, size_t num_blocks);
    static size_t head_bytes(const HeadShape& shape, CacheType type);   // of one kv head of one block of one layer
    uint8_t* head(size_t layer, size_t block, size_t kv_head) const {
        return memory_.data() + ((layer * num_blocks_ + block) * shape_.num_kv_heads + kv_head) * head_bytes_;
    }
    CacheType type() const { return type_; }
    size_t num_blocks() const { return num_blocks_; }
    size_t key_bytes() const { return shape_.head_dim * kCacheBlock * value_bytes_; }
    size_t value_panel_bytes() const { return kCacheBlock * 32 * value_bytes_; }
    float* scales(uint8_t* head) const {
        return reinterpret_cast<float*>(head + (shape_.head_dim + shape_.padded_dim()) * kCacheBlock * value_bytes_);
    }
    void put(const Ops& ops, uint8_t* head, size_t slot, const float* key, const float* value) const;

private:
    const HeadShape shape_;
    const CacheType type_;
    const size_t num_blocks_, value_bytes_, head_bytes_;
    Memory memory_;
};

class Attention {
public:
    Attention(const Ops& ops, const HeadShape& shape, const KvCache& cache, int num_threads);

    // Plan a step; called by one thread before the layers run.
    void plan(const Sequences& sequences);
    // Rotate q and k of every token in place and write k and v into the cache. qkv: [tokens][q | k | v].
    void rope_and_append(const Sequences& s, size_t layer, float* qkv, int thread, int num_threads) const;
    // out[tokens][num_heads * head_dim]. attend() then, after a barrier, merge().
    void attend(const Sequences& s, size_t layer, const float* qkv, float* out, size_t queue, int thread, WorkQueue& work);
    void merge(float* out, int thread, int num_threads) const;

private:
    struct Item {   // a tile of query tokens of one sequence and one kv head, over chunks [first_chunk, last_chunk)
        size_t sequence, kv_head, token, num_tokens, first_chunk, last_chunk;
        ptrdiff_t part;   // where a split item leaves its chunk for merge(); -1: writes the output itself
    };
    struct Merge {   // one split token of one kv head
        size_t token, kv_head, first_part, num_parts;
    };
    struct Scratch {   // of one thread
        std::vector<float> query, scores, chunk, sum;
        std::vector<float> chunk_max, chunk_sum, total_max, total_sum;
    };
    void attend_item(const Sequences& s, const Item& item, size_t layer, const float* qkv, float* out, Scratch& scratch);
    void attend_chunk(const Sequences& s, const Item& item, size_t layer, size_t chunk, size_t num_rows, Scratch& scratch) const;
    void fold(size_t num_rows, Scratch& scratch) const;
    void store(const float* sum, float total, float* out) const;

    const Ops& ops_;
    const HeadShape shape_;
    const KvCache& cache_;
    const size_t tokens_per_tile_, max_rows_;
    std::vector<Scratch> scratch_;
    std::vector<Item> items_;
    std::vector<Merge> merges_;
    std::vector<float> parts_;   // [part][group][padded_dim + 2]: weighted values, max, sum
};

}  // namespace miniphi
