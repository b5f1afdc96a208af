#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "cache_codes.h"

namespace miniphi {
namespace {

constexpr size_t kTileRows = 48;         // query rows that share one pass over the keys: 48 x 256 scores are 48 KiB
constexpr int kScoreRows = 6;            // of a tile over keys: over so few values of K starting more rows costs more than it saves
constexpr size_t kSplitTokens = 4;       // sequences with at most this many queries split their context
constexpr size_t kTokensAhead = 4;       // that queries, keys and values are fetched before they are worked on
constexpr float kMinusInfinity = -INFINITY, kLog2E = 1.44269504f;

// The first 2 * half values of a head turned by their position's angles: y = x where nothing is left of x to read.
void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, size_t half, float* __restrict y) {
    for (size_t i = 0; i < half; i++) {
        y[i] = x[i] * cos[i] - x[i + half] * sin[i];
        y[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
    }
}

}  // namespace

Attention::Attention(const Ops& ops, const HeadShape& shape, const KvCache& cache, int num_threads)
    : ops_(ops),
      shape_(shape),
      cache_(cache),
      tokens_per_tile_(std::max<size_t>(1, kTileRows / shape.group())),
      max_rows_(std::max(kSplitTokens, tokens_per_tile_) * shape.group()),
      scratch_(num_threads) {
    const size_t query_rows = std::max(max_rows_, kSplitTokens * shape.num_heads);
    for (Scratch& s : scratch_) {
        s.loaded.resize(shape.num_kv_heads);
        s.query.resize(query_rows * shape.padded_dim());
        s.scores.resize(max_rows_ * kChunk);
        s.chunk.resize(max_rows_ * shape.padded_dim());
        s.sum.resize(max_rows_ * shape.padded_dim());
        for (auto* v : {&s.chunk_max, &s.chunk_sum, &s.total_max, &s.total_sum, &s.weight_scale}) v->resize(max_rows_);
        if (!cache.is_quantized()) continue;
        s.query_codes.resize(query_rows * shape.padded_dim());
        s.query_scale.resize(query_rows * shape.padded_dim() / kGroup);
        s.query_correction.resize(s.query_scale.size());
        s.query_sums.resize(shape.padded_dim() / 16);
        s.value_scale.resize(kMaxHeadsTogether * kChunk);
        s.high.resize(max_rows_ * kChunk);
        s.low.resize(s.high.size());
    }
}

void Attention::plan(const Sequences& s) {
    items_.clear();
    splits_.clear();
    size_t num_parts = 0;
    for (size_t sequence = 0; sequence < s.num_sequences; sequence++) {
        if (size_t(s.query_starts[sequence + 1] - s.query_starts[sequence]) <= kSplitTokens) plan_split(s, sequence, &num_parts);
        else plan_tiles(s, sequence);
    }
    parts_.resize(std::max(parts_.size(), num_parts * shape_.group() * (shape_.padded_dim() + 2)));
}

// Tiles of many queries, one kv head each: its keys and values stay in the level-two cache for the tiles that follow.
void Attention::plan_tiles(const Sequences& s, size_t sequence) {
    const size_t first = s.query_starts[sequence], last = s.query_starts[sequence + 1];
    for (size_t kv_head = 0; kv_head < shape_.num_kv_heads; kv_head++) {
        for (size_t token = first; token < last; token += tokens_per_tile_) {
            const size_t count = std::min(tokens_per_tile_, last - token), newest = s.positions[token + count - 1];
            items_.push_back({sequence, token, count, kv_head, 1, first_chunk(s, token), newest / kChunk + 1, -1});
        }
    }
}

// A few queries: one chunk of as many heads as lie together in the cache, in the order of the cache.
void Attention::plan_split(const Sequences& s, size_t sequence, size_t* num_parts) {
    const size_t token = s.query_starts[sequence], num_tokens = s.query_starts[sequence + 1] - token;
    const size_t first = first_chunk(s, token), num_chunks = s.positions[token + num_tokens - 1] / kChunk + 1 - first;
    const size_t heads = shape_.num_kv_heads, together = cache_.heads_together();
    const size_t most = std::max<size_t>(1, max_rows_ / (num_tokens * shape_.group()));
    ptrdiff_t split = -1;
    if (num_chunks > 1) {
        split = ptrdiff_t(splits_.size());
        splits_.push_back({token, num_tokens, first, num_chunks, *num_parts});
        *num_parts += num_tokens * heads * num_chunks;
    }
    for (size_t chunk = first; chunk < first + num_chunks; chunk++) {
        for (size_t kv_head = 0, count; kv_head < heads; kv_head += count) {
            count = std::min(most, together - kv_head % together);
            items_.push_back({sequence, token, num_tokens, kv_head, count, chunk, chunk + 1, split});
        }
    }
}

// The chunk of the oldest key that a token sees.
size_t Attention::first_chunk(const Sequences& s, size_t token) const {
    const size_t end = s.positions[token] + 1;
    return shape_.window && end > shape_.window ? (end - shape_.window) / kChunk : 0;
}

void Attention::rope_and_append(const Sequences& s, size_t layer, const float* qkv, int thread, int num_threads) const {
    const size_t dim = shape_.head_dim, half = shape_.rotary_dim / 2;
    const size_t width = shape_.query_width() + 2 * shape_.kv_width();
    std::vector<float> rotated(dim);
    // Work is cut by head, so that one token keeps every thread busy and a thread writes whole cache lines of keys.
    const size_t heads = shape_.num_kv_heads;
    for (size_t sequence = 0; sequence < s.num_sequences; sequence++) {
        const int32_t* table = s.block_tables + sequence * s.max_blocks;
        for (size_t head = heads * thread / num_threads; head < heads * (thread + 1) / num_threads; head++) {
            for (int32_t t = s.query_starts[sequence]; t < s.query_starts[sequence + 1]; t++) {
                const float* key = qkv + t * width + shape_.query_width() + head * dim;
                for (size_t i = 0; i < dim; i += 64 / sizeof(float)) {   // rows are far apart, and memory is slow
                    __builtin_prefetch(key + kTokensAhead * width + i);
                    __builtin_prefetch(key + kTokensAhead * width + shape_.kv_width() + i);
                }
                rotate(key, s.cos + t * half, s.sin + t * half, half, rotated.data());
                std::copy(key + 2 * half, key + dim, rotated.data() + 2 * half);
                const size_t position = s.positions[t];
                cache_.put(ops_, cache_.head(layer, table[position / kCacheBlock], head), position % kCacheBlock,
                           rotated.data(), key + shape_.kv_width());
            }
        }
    }
}

void Attention::take_queries(const Sequences& s, const Item& item, const float* qkv, Scratch& scratch) const {
    if (item.split < 0 || item.split != scratch.loaded_split) {
        scratch.loaded_split = item.split;
        std::fill(scratch.loaded.begin(), scratch.loaded.end(), 0);
    }
    scratch.first_query = item.split < 0 ? 0 : item.kv_head * rows_per_head(item);
    if (item.split >= 0 && std::exchange(scratch.loaded[item.kv_head], 1)) return;
    load_queries(s, item, qkv, scratch);
}

// Queries turned by their positions, scaled, mixed as the keys are; as int8 too for a quantised cache.
void Attention::load_queries(const Sequences& s, const Item& item, const float* qkv, Scratch& scratch) const {
    const size_t group = shape_.group(), dim = shape_.head_dim, padded = shape_.padded_dim(), groups = padded / kGroup;
    const size_t half = shape_.rotary_dim / 2, width = shape_.query_width() + 2 * shape_.kv_width(), rows = rows_per_head(item);
    const float scale = kLog2E / std::sqrt(float(dim));   // weights are powers of two
    for (size_t row = 0; row < item.num_heads * rows; row++) {
        const size_t kv_head = item.kv_head + row / rows, token = item.token + row % rows / group;
        const float* q = qkv + token * width + (kv_head * group + row % group) * dim;
        const size_t at = scratch.first_query + row;
        float* query = scratch.query.data() + at * padded;
        for (size_t i = 0; i < dim; i += 64 / sizeof(float)) __builtin_prefetch(q + kTokensAhead * width + i);
        rotate(q, s.cos + token * half, s.sin + token * half, half, query);
        std::copy(q + 2 * half, q + dim, query + 2 * half);
        for (size_t i = 0; i < dim; i++) query[i] *= scale;
        std::fill(query + dim, query + padded, 0.0f);
        if (!cache_.is_quantized()) continue;
        if (cache_.type() == CacheType::Q4) hadamard(query, padded);
        int32_t* sums = scratch.query_sums.data();
        ops_.quantize_row(query, padded, scratch.query_codes.data() + at * padded, scratch.query_scale.data() + at * groups, sums);
        const int zero = layout_of(cache_.key_kind()).zero;
        for (size_t g = 0; g < groups; g++) scratch.query_correction[at * groups + g] = -zero * (sums[2 * g] + sums[2 * g + 1]);
    }
}

// scores[row][32 b ..] = query row x keys of block b
void Attention::score(const KvCache::Head* blocks, Span span, size_t first_row, size_t num_rows, Scratch& scratch) const {
    const size_t padded = shape_.padded_dim(), groups = padded / kGroup;
    const Kind kind = cache_.key_kind();
    const QuantRows queries{scratch.query_codes.data(), scratch.query_scale.data(), nullptr, scratch.query_correction.data(),
                            nullptr, padded, groups, groups, groups};
    const size_t limit = cache_.is_quantized() ? std::min(ops_.tile_rows, kScoreRows) : kMaxPanelRows;
    for (size_t b = span.first; b < span.last; b++) {
        for (size_t row = first_row; row < first_row + num_rows; row += limit) {
            const int rows = int(std::min(limit, first_row + num_rows - row));
            const size_t query = scratch.first_query + row;
            float* scores = scratch.scores.data() + row * kChunk + b * kCacheBlock;
            if (cache_.is_quantized()) {
                ops_.tile[int(kind)](blocks[b].keys, Prefetch{nullptr, 0}, queries, query, rows, scores, kChunk, false);
            } else {
                ops_.panel[int(kind)](scratch.query.data() + query * padded, padded, rows, blocks[b].keys, shape_.head_dim, scores,
                                      kChunk, false);
            }
        }
    }
}

// chunk[row] = sum of weights x values
void Attention::weigh(const KvCache::Head* blocks, Span span, size_t first_row, size_t num_rows, Scratch& scratch) const {
    const size_t padded = shape_.padded_dim();
    for (size_t i = 0; i < padded / 32; i++) {
        for (size_t b = span.first; b < span.last; b++) {
            for (size_t row = first_row; row < first_row + num_rows; row += kMaxPanelRows) {
                const int rows = int(std::min<size_t>(kMaxPanelRows, first_row + num_rows - row));
                const float* p = scratch.scores.data() + row * kChunk + b * kCacheBlock;
                ops_.panel[int(cache_.key_kind())](p, kChunk, rows, blocks[b].values + i * cache_.value_stride(),
                                                   std::min(kCacheBlock, span.end - b * kCacheBlock),
                                                   scratch.chunk.data() + row * padded + 32 * i, padded, b > span.first);
            }
        }
    }
}

// The scales of V as floats. Read right after the keys, as they lie: memory serves one stream best.
void Attention::load_scales(const KvCache::Head* blocks, Span span, float* scale) const {
    const float one = 1;
    for (size_t b = span.first; b < span.last; b++)   // a panel of depth 1 is a conversion of 32 halves
        ops_.panel[int(Kind::F16)](&one, 1, 1, blocks[b].scales, 1, scale + b * kCacheBlock, kCacheBlock, false);
}

void Attention::weigh_quantized(const KvCache::Head* blocks, Span span, size_t first_row, size_t num_rows, Scratch& scratch) const {
    const size_t padded = shape_.padded_dim(), offset = span.first * kCacheBlock;
    const ValuesFn values = cache_.type() == CacheType::Q8 ? ops_.values_8 : ops_.values_4;
    const uint8_t* panels[kChunkBlocks];
    for (size_t i = 0; i < padded / 32; i++) {
        for (size_t b = span.first; b < span.last; b++) panels[b - span.first] = blocks[b].values + i * cache_.value_stride();
        for (size_t row = first_row; row < first_row + num_rows; row += kMaxValueRows) {
            const size_t at = row * kChunk + offset;
            const WeightPlanes weights{scratch.high.data() + at, scratch.low.data() + at, kChunk};
            values(panels, span.end - offset, weights, int(std::min<size_t>(kMaxValueRows, first_row + num_rows - row)),
                   scratch.weight_scale.data() + row, scratch.chunk.data() + row * padded + 32 * i, padded);
        }
    }
}

void Attention::attend_chunk(const Sequences& s, const Item& item, size_t layer, size_t chunk, Scratch& scratch) const {
    const size_t rows = rows_per_head(item), group = shape_.group(), start = chunk * kChunk;
    const int32_t* table = s.block_tables + item.sequence * s.max_blocks + chunk * kChunkBlocks;
    const auto visible = [&](size_t token, size_t* low, size_t* high) {   // keys of this chunk, [low, high)
        const size_t end = s.positions[item.token + token] + 1;
        const size_t begin = shape_.window && end > shape_.window ? end - shape_.window : 0;
        *low = std::clamp(begin, start, start + kChunk) - start;
        *high = std::clamp(end, start, start + kChunk) - start;
    };
    size_t low, high, unused;
    visible(0, &low, &unused);
    visible(item.num_tokens - 1, &unused, &high);
    const Span span{low / kCacheBlock, (high + kCacheBlock - 1) / kCacheBlock, high};
    KvCache::Head heads[kMaxHeadsTogether][kChunkBlocks];
    for (size_t b = span.first; b < span.last; b++) {
        heads[0][b] = cache_.head(layer, table[b], item.kv_head);
        for (size_t h = 1; h < item.num_heads; h++) heads[h][b] = cache_.next(heads[h - 1][b]);
    }

    const bool quantized = cache_.is_quantized();
    for (size_t h = 0; h < item.num_heads; h++) score(heads[h], span, h * rows, rows, scratch);
    if (quantized)
        for (size_t h = 0; h < item.num_heads; h++) load_scales(heads[h], span, scratch.value_scale.data() + h * kChunk);
    const size_t offset = span.first * kCacheBlock, count = (span.last - span.first) * kCacheBlock;
    for (size_t row = 0; row < item.num_heads * rows; row++) {
        visible(row % rows / group, &low, &high);
        low = std::clamp(low, offset, offset + count);
        high = std::clamp(high, low, offset + count);
        const size_t at = row * kChunk + offset;
        float* weights = scratch.scores.data() + at;
        const Softmax softmax =
            quantized ? ops_.quantized_softmax(weights, scratch.value_scale.data() + row / rows * kChunk + offset, count, low - offset,
                                               high - offset, scratch.high.data() + at, scratch.low.data() + at)
                      : ops_.softmax(weights, count, low - offset, high - offset);
        scratch.chunk_max[row] = softmax.max;
        scratch.chunk_sum[row] = softmax.sum;
        scratch.weight_scale[row] = softmax.unit;
    }
    for (size_t h = 0; h < item.num_heads; h++) {
        if (quantized) weigh_quantized(heads[h], span, h * rows, rows, scratch);
        else weigh(heads[h], span, h * rows, rows, scratch);
    }
}

// Merge the chunk into the running result: both are sums relative to their own maximum.
void Attention::fold(size_t num_rows, Scratch& scratch) const {
    const size_t padded = shape_.padded_dim();
    for (size_t row = 0; row < num_rows; row++) {
        if (scratch.chunk_max[row] == kMinusInfinity) continue;   // this row sees nothing of the chunk
        const float max = std::max(scratch.total_max[row], scratch.chunk_max[row]);
        const float alpha = std::exp2(scratch.total_max[row] - max), beta = std::exp2(scratch.chunk_max[row] - max);
        ops_.blend(alpha, scratch.sum.data() + row * padded, beta, scratch.chunk.data() + row * padded, padded);
        scratch.total_sum[row] = alpha * scratch.total_sum[row] + beta * scratch.chunk_sum[row];
        scratch.total_max[row] = max;
    }
}

void Attention::store(float* sum, float total, float* out) const {
    if (cache_.type() == CacheType::Q4) hadamard(sum, shape_.padded_dim());
    const float inverse = 1.0f / total;
    for (size_t i = 0; i < shape_.head_dim; i++) out[i] = sum[i] * inverse;
}

float* Attention::part(const Split& split, size_t token, size_t kv_head, size_t chunk) {
    const size_t index = (token - split.token) * shape_.num_kv_heads + kv_head;
    return parts_.data() + (split.first_part + index * split.num_chunks + chunk - split.first_chunk) * shape_.group() * (shape_.padded_dim() + 2);
}

void Attention::leave_parts(const Item& item, size_t chunk, const Scratch& scratch) {
    const size_t padded = shape_.padded_dim();
    size_t row = 0;
    for (size_t head = 0; head < item.num_heads; head++) {
        for (size_t token = 0; token < item.num_tokens; token++) {
            float* to = part(splits_[item.split], item.token + token, item.kv_head + head, chunk);
            for (size_t g = 0; g < shape_.group(); g++, row++, to += padded + 2) {
                std::memcpy(to, scratch.chunk.data() + row * padded, padded * sizeof(float));
                to[padded] = scratch.chunk_max[row];
                to[padded + 1] = scratch.chunk_sum[row];
            }
        }
    }
}

void Attention::attend_item(const Sequences& s, const Item& item, size_t layer, const float* qkv, float* out,
                            Scratch& scratch) {
    const size_t group = shape_.group(), padded = shape_.padded_dim(), rows = rows_per_head(item), num_rows = item.num_heads * rows;
    take_queries(s, item, qkv, scratch);
    if (item.split >= 0) {
        for (size_t chunk = item.first_chunk; chunk < item.last_chunk; chunk++) {
            attend_chunk(s, item, layer, chunk, scratch);
            leave_parts(item, chunk, scratch);
        }
        return;
    }
    std::fill_n(scratch.sum.begin(), num_rows * padded, 0.0f);
    std::fill_n(scratch.total_max.begin(), num_rows, kMinusInfinity);
    std::fill_n(scratch.total_sum.begin(), num_rows, 0.0f);
    for (size_t chunk = item.first_chunk; chunk < item.last_chunk; chunk++) {
        attend_chunk(s, item, layer, chunk, scratch);
        fold(num_rows, scratch);
    }
    for (size_t row = 0; row < num_rows; row++) {
        const size_t token = item.token + row % rows / group, head = (item.kv_head + row / rows) * group + row % group;
        store(scratch.sum.data() + row * padded, scratch.total_sum[row], out + token * shape_.query_width() + head * shape_.head_dim);
    }
}

void Attention::attend(const Sequences& s, size_t layer, const float* qkv, float* out, size_t queue, int thread,
                       WorkQueue& work) {
    Scratch& scratch = scratch_[thread];
    scratch.loaded_split = -1;   // what it has is of another layer
    size_t item;
    while (work.take(queue, thread, items_.size(), &item)) attend_item(s, items_[item], layer, qkv, out, scratch);
}

void Attention::merge(float* out, int thread, int num_threads) {
    for (const Split& split : splits_) {
        const size_t heads = shape_.num_kv_heads, count = split.num_tokens * heads;
        for (size_t i = count * thread / num_threads; i < count * (thread + 1) / num_threads; i++)
            merge_token(split, split.token + i / heads, i % heads, out, scratch_[thread].sum.data());
    }
}

void Attention::merge_token(const Split& split, size_t token, size_t kv_head, float* out, float* sum) {
    const size_t group = shape_.group(), padded = shape_.padded_dim();
    for (size_t g = 0; g < group; g++) {
        std::fill_n(sum, padded, 0.0f);
        float total_max = kMinusInfinity, total_sum = 0;
        for (size_t chunk = split.first_chunk; chunk < split.first_chunk + split.num_chunks; chunk++) {
            const float* from = part(split, token, kv_head, chunk) + g * (padded + 2);
            if (from[padded] == kMinusInfinity) continue;
            const float max = std::max(total_max, from[padded]);
            const float alpha = std::exp2(total_max - max), beta = std::exp2(from[padded] - max);
            ops_.blend(alpha, sum, beta, from, padded);
            total_sum = alpha * total_sum + beta * from[padded + 1];
            total_max = max;
        }
        store(sum, total_sum, out + token * shape_.query_width() + (kv_head * group + g) * shape_.head_dim);
    }
}

}  // namespace miniphi
