// Causal attention over the paged cache.
//
// Over a float cache both products are the panel kernel of ops.h: scores = q x K, output = p x V. Over a quantised cache
// queries become int8 (groups of 32) and weights 14-bit numbers, p times the scale of its value, so that both products are
// exact sums of integers and nothing is dequantised.
//
// One row of attention always means the same arithmetic, whatever comes with it: the context is cut at multiples of
// 256 positions; inside a chunk, scores -> max -> exp -> sum -> weighted values; chunks are merged in ascending order.
// A short query over a long context spreads its chunks over the threads and merges them afterwards.
#pragma once
#include <vector>

#include "kv_cache.h"

namespace miniphi {

constexpr size_t kChunkBlocks = kExtentBlocks;
constexpr size_t kChunk = kCacheBlock * kChunkBlocks;
static_assert(kChunkBlocks <= kMaxPanels);

// One step's sequences, as the program hands them on. Arrays are those of engine/batch.py.
struct Sequences {
    size_t num_tokens, num_sequences, max_blocks;
    const int32_t* positions;       // [num_tokens]
    const int32_t* query_starts;    // [num_sequences + 1]
    const int32_t* context_lens;    // [num_sequences]
    const int32_t* block_tables;    // [num_sequences][max_blocks]
    const float *cos, *sin;         // [num_tokens][rotary_dim / 2]
};

class Attention {
public:
    Attention(const Ops& ops, const HeadShape& shape, const KvCache& cache, int num_threads);

    // Plan a step; called by one thread before the layers run.
    void plan(const Sequences& sequences);
    // Rotate k of every token and write it and v into the cache. qkv: [tokens][q | k | v].
    void rope_and_append(const Sequences& s, size_t layer, const float* qkv, int thread, int num_threads) const;
    // out[tokens][num_heads * head_dim], q being rotated as it is read. attend() then, after a barrier, merge().
    void attend(const Sequences& s, size_t layer, const float* qkv, float* out, size_t queue, int thread, WorkQueue& work);
    void merge(float* out, int thread, int num_threads) const;

private:
    struct Item {   // a tile of query tokens of one sequence and one kv head, over chunks [first_chunk, last_chunk)
        size_t sequence, kv_head, token, num_tokens, first_chunk, last_chunk;
        ptrdiff_t part;   // where a split item leaves its first chunk for merge(); -1: writes the output itself
    };
    struct Merge {   // one split token of one kv head
        size_t token, kv_head, first_part, num_parts;
    };
    struct Scratch {   // of one thread
        std::vector<float> query, scores, chunk, sum;
        std::vector<float> chunk_max, chunk_sum, total_max, total_sum;
        // Of a quantised cache: queries as int8, the chunk's value scales, weights as integers.
        std::vector<int8_t> query_codes;
        std::vector<float> query_scale, value_scale, weight_scale;
        std::vector<int32_t> query_correction;
        std::vector<uint8_t> high, low;
    };
    struct Span {   // what a tile sees of a chunk: cache blocks [first, last) of it
        size_t first, last;
    };
    void attend_item(const Sequences& s, const Item& item, size_t layer, const float* qkv, float* out, Scratch& scratch);
    void load_queries(const Sequences& s, const Item& item, const float* qkv, Scratch& scratch) const;
    void attend_chunk(const Sequences& s, const Item& item, size_t layer, size_t chunk, Scratch& scratch) const;
    void score(const KvCache::Head* heads, Span span, size_t num_rows, Scratch& scratch) const;
    void weigh(const KvCache::Head* heads, Span span, size_t num_rows, Scratch& scratch) const;
    void weigh_quantized(const KvCache::Head* heads, const uint8_t* next, Span span, size_t num_rows, Scratch& scratch) const;
    void fold(size_t num_rows, Scratch& scratch) const;
    void store(float* sum, float total, float* out) const;

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
