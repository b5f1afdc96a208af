// Causal attention over the paged cache.
//
// Over a float cache both products are the panel kernel of ops.h: scores = q x K, output = p x V. Over a quantised cache
// queries become int8 (groups of 32) and weights 14-bit numbers, p times the scale of its value, so that both products are
// exact sums of integers and nothing is dequantised.
//
// One row of attention always means the same arithmetic, whatever comes with it: the context is cut at multiples of
// 256 positions; inside a chunk, scores -> max -> powers of two -> sum -> weighted values; chunks are merged in ascending order.
// A few queries over a long context spread its chunks over the threads and merge them afterwards. Their items follow the
// cache's layout, so that a thread reads one stream of memory.
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
    void merge(float* out, int thread, int num_threads);

private:
    // What a thread does in one go: queries of tokens [token, token + num_tokens) of one sequence, for neighbouring kv heads,
    // over chunks [first_chunk, last_chunk). Its rows are [kv head][token][query head of the group].
    struct Item {
        size_t sequence, token, num_tokens, kv_head, num_heads, first_chunk, last_chunk;
        ptrdiff_t split;   // whose parts it leaves for merge(); -1: it writes the output itself
    };
    // A sequence of few queries over several chunks, which are shared out. Parts are [token][kv head][chunk].
    struct Split {
        size_t token, num_tokens, first_chunk, num_chunks, first_part;
    };
    struct Scratch {   // of one thread
        // Queries of an item, from row first_query on. Those of a split are kept for its other chunks: every kv head has rows of
        // its own then, and loaded[kv head] says whether an item that begins there has filled them.
        size_t first_query = 0;
        ptrdiff_t loaded_split = -1;
        std::vector<char> loaded;
        std::vector<float> query, scores, chunk, sum;
        std::vector<float> chunk_max, chunk_sum, total_max, total_sum, weight_scale;
        // Of a quantised cache: queries as int8, the chunk's value scales, weights as integers.
        std::vector<int8_t> query_codes;
        std::vector<float> query_scale, value_scale;
        std::vector<int32_t> query_correction, query_sums;
        std::vector<uint8_t> high, low;
    };
    struct Span {   // what a tile sees of a chunk: cache blocks [first, last) of it, tokens up to `end`
        size_t first, last, end;
    };
    size_t rows_per_head(const Item& item) const { return item.num_tokens * shape_.group(); }
    size_t first_chunk(const Sequences& s, size_t token) const;
    void plan_tiles(const Sequences& s, size_t sequence);
    void plan_split(const Sequences& s, size_t sequence, size_t* num_parts);
    void attend_item(const Sequences& s, const Item& item, size_t layer, const float* qkv, float* out, Scratch& scratch);
    void take_queries(const Sequences& s, const Item& item, const float* qkv, Scratch& scratch) const;
    void load_queries(const Sequences& s, const Item& item, const float* qkv, Scratch& scratch) const;
    void attend_chunk(const Sequences& s, const Item& item, size_t layer, size_t chunk, Scratch& scratch) const;
    void score(const KvCache::Head* blocks, Span span, size_t first_row, size_t num_rows, Scratch& scratch) const;
    void load_scales(const KvCache::Head* blocks, Span span, float* scale) const;
    void weigh(const KvCache::Head* blocks, Span span, size_t first_row, size_t num_rows, Scratch& scratch) const;
    void weigh_quantized(const KvCache::Head* blocks, Span span, size_t first_row, size_t num_rows, Scratch& scratch) const;
    void fold(size_t num_rows, Scratch& scratch) const;
    float* part(const Split& split, size_t token, size_t kv_head, size_t chunk);
    void leave_parts(const Item& item, size_t chunk, const Scratch& scratch);
    void merge_token(const Split& split, size_t token, size_t kv_head, float* out, float* sum);
    void store(float* sum, float total, float* out) const;

    const Ops& ops_;
    const HeadShape shape_;
    const KvCache& cache_;
    const size_t tokens_per_tile_, max_rows_;
    std::vector<Scratch> scratch_;
    std::vector<Item> items_;
    std::vector<Split> splits_;
    std::vector<float> parts_;   // [part][query head of the group][padded_dim + 2]: weighted values, max, sum
};

}  // namespace miniphi
