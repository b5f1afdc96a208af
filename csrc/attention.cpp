#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace miniphi {
namespace {

constexpr size_t kTileRows = 48;         // query rows that share one pass over the keys: 48 x 256 scores are 48 KiB
constexpr size_t kSplitTokens = 4;       // sequences with at most this many queries split their context
constexpr size_t kItemsPerThread = 8;    // that a split context is cut into, at least, in runs of at most so many chunks:
constexpr size_t kLongestRun = 8;        // a run prepares its query once
constexpr float kMinusInfinity = -INFINITY;

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
    for (Scratch& s : scratch_) {
        s.query.resize(max_rows_ * shape.padded_dim());
        s.scores.resize(max_rows_ * kChunk);
        s.chunk.resize(max_rows_ * shape.padded_dim());
        s.sum.resize(max_rows_ * shape.padded_dim());
        for (auto* v : {&s.chunk_max, &s.chunk_sum, &s.total_max, &s.total_sum}) v->resize(max_rows_);
        if (!cache.is_quantized()) continue;
        s.query_codes.resize(max_rows_ * shape.padded_dim());
        s.query_scale.resize(max_rows_ * shape.padded_dim() / kGroup);
        s.query_correction.resize(s.query_scale.size());
        s.value_scale.resize(kChunk);
        s.weight_scale.resize(max_rows_);
        s.high.resize(max_rows_ * kChunk);
        s.low.resize(s.high.size());
    }
}

void Attention::plan(const Sequences& s) {
    items_.clear();
    merges_.clear();
    size_t num_parts = 0;
    for (size_t sequence = 0; sequence < s.num_sequences; sequence++) {
        const size_t first = s.query_starts[sequence], last = s.query_starts[sequence + 1];
        const bool split = last - first <= kSplitTokens;
        const size_t step = split ? 1 : tokens_per_tile_;
        for (size_t kv_head = 0; kv_head < shape_.num_kv_heads; kv_head++) {
            for (size_t token = first; token < last; token += step) {
                const size_t count = std::min(step, last - token);
                const size_t oldest = s.positions[token], newest = s.positions[token + count - 1];
                const size_t low = shape_.window && oldest + 1 > shape_.window ? oldest + 1 - shape_.window : 0;
                Item item{sequence, kv_head, token, count, low / kChunk, newest / kChunk + 1, -1};
                if (!split || item.last_chunk - item.first_chunk == 1) {
                    items_.push_back(item);
                    continue;
                }
                const size_t num_chunks = item.last_chunk - item.first_chunk;
                merges_.push_back({token, kv_head, num_parts, num_chunks});
                const size_t run =
                    std::clamp<size_t>(num_chunks * shape_.num_kv_heads / (kItemsPerThread * scratch_.size()), 1, kLongestRun);
                for (size_t chunk = item.first_chunk; chunk < item.last_chunk; chunk += run) {
                    const size_t end = std::min(chunk + run, item.last_chunk);
                    items_.push_back({sequence, kv_head, token, 1, chunk, end, ptrdiff_t(num_parts)});
                    num_parts += end - chunk;
                }
            }
        }
    }
    parts_.resize(std::max(parts_.size(), num_parts * shape_.group() * (shape_.padded_dim() + 2)));
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
                rotate(key, s.cos + t * half, s.sin + t * half, half, rotated.data());
                std::copy(key + 2 * half, key + dim, rotated.data() + 2 * half);
                const size_t position = s.positions[t];
                cache_.put(ops_, cache_.head(layer, table[position / kCacheBlock], head), position % kCacheBlock,
                           rotated.data(), key + shape_.kv_width());
            }
        }
    }
}

// Queries turned by their positions, scaled, mixed as the keys are; as int8 too for a quantised cache.
void Attention::load_queries(const Sequences& s, const Item& item, const float* qkv, Scratch& scratch) const {
    const size_t group = shape_.group(), dim = shape_.head_dim, padded = shape_.padded_dim(), groups = padded / kGroup;
    const size_t half = shape_.rotary_dim / 2;
    const size_t width = shape_.query_width() + 2 * shape_.kv_width();
    const float scale = 1.0f / std::sqrt(float(dim));
    std::vector<int32_t> sums(padded / 16);
    for (size_t row = 0; row < item.num_tokens * group; row++) {
        const float* q = qkv + (item.token + row / group) * width + (item.kv_head * group + row % group) * dim;
        float* query = scratch.query.data() + row * padded;
        const size_t token = item.token + row / group;
        rotate(q, s.cos + token * half, s.sin + token * half, half, query);
        std::copy(q + 2 * half, q + dim, query + 2 * half);
        for (size_t i = 0; i < dim; i++) query[i] *= scale;
        std::fill(query + dim, query + padded, 0.0f);
        if (!cache_.is_quantized()) continue;
        if (cache_.type() == CacheType::Q4) hadamard(query, padded);
        ops_.quantize_row(query, padded, kGroup, scratch.query_codes.data() + row * padded,
                          scratch.query_scale.data() + row * groups, sums.data());
        const int zero = layout_of(cache_.key_kind()).zero;
        for (size_t g = 0; g < groups; g++) scratch.query_correction[row * groups + g] = -zero * (sums[2 * g] + sums[2 * g + 1]);
    }
}

// scores[row][32 b ..] = query row x keys of block b
void Attention::score(const KvCache::Head* heads, Span span, size_t num_rows, Scratch& scratch) const {
    const size_t padded = shape_.padded_dim(), groups = padded / kGroup;
    const Kind kind = cache_.key_kind();
    const QuantRows queries{scratch.query_codes.data(), scratch.query_scale.data(), scratch.query_correction.data(), nullptr,
                            padded, groups, groups, groups};
    const size_t limit = cache_.is_quantized() ? kMaxTileRows : kMaxPanelRows;
    // Meanwhile the values come to the level-two cache, as many lines of them as the keys have.
    const uint8_t* values = heads[span.first].values;
    for (size_t b = span.first; b < span.last; b++, values += block_bytes(kind, padded)) {
        for (size_t row = 0; row < num_rows; row += limit) {
            const int rows = int(std::min(limit, num_rows - row));
            float* scores = scratch.scores.data() + row * kChunk + b * kCacheBlock;
            if (cache_.is_quantized()) {
                ops_.tile[int(kind)](heads[b].keys, Prefetch{values, row == 0 ? ~0u : 0}, queries, row, rows, scores, kChunk, false);
            } else {
                ops_.panel[int(kind)](scratch.query.data() + row * padded, padded, rows, heads[b].keys, shape_.head_dim, scores,
                                      kChunk, false);
            }
        }
    }
}

// chunk[row] = sum of weights x values
void Attention::weigh(const KvCache::Head* heads, Span span, size_t num_rows, Scratch& scratch) const {
    const size_t padded = shape_.padded_dim();
    for (size_t b = span.first; b < span.last; b++) {
        for (size_t row = 0; row < num_rows; row += kMaxPanelRows) {
            const int rows = int(std::min<size_t>(kMaxPanelRows, num_rows - row));
            const float* p = scratch.scores.data() + row * kChunk + b * kCacheBlock;
            for (size_t i = 0; i < padded / 32; i++)
                ops_.panel[int(cache_.key_kind())](p, kChunk, rows, heads[b].values + i * cache_.value_stride(), kCacheBlock,
                                                   scratch.chunk.data() + row * padded + 32 * i, padded, b > span.first);
        }
    }
}

// next: the keys that most likely come after these values, or null.
void Attention::weigh_quantized(const KvCache::Head* heads, const uint8_t* next, Span span, size_t num_rows,
                                Scratch& scratch) const {
    const size_t padded = shape_.padded_dim(), offset = span.first * kCacheBlock, count = (span.last - span.first) * kCacheBlock;
    const float one = 1;
    float* scale = scratch.value_scale.data();
    for (size_t b = span.first; b < span.last; b++)   // a panel of depth 1 is a conversion of 32 halves
        ops_.panel[int(Kind::F16)](&one, 1, 1, heads[b].scales, 1, scale + b * kCacheBlock, kCacheBlock, false);
    for (size_t row = 0; row < num_rows; row++) {
        const size_t at = row * kChunk + offset;
        scratch.weight_scale[row] = ops_.quantize_weights(scratch.scores.data() + at, scale + offset, count,
                                                          scratch.high.data() + at, scratch.low.data() + at);
    }
    const ValuesFn values = cache_.type() == CacheType::Q8 ? ops_.values_8 : ops_.values_4;
    const uint8_t* panels[kChunkBlocks];
    for (size_t i = 0; i < padded / 32; i++) {
        for (size_t b = span.first; b < span.last; b++) panels[b - span.first] = heads[b].values + i * cache_.value_stride();
        for (size_t row = 0; row < num_rows; row += kMaxTileRows) {
            const size_t at = row * kChunk + offset;
            const WeightPlanes weights{scratch.high.data() + at, scratch.low.data() + at, kChunk};
            values(panels, span.last - span.first, row == 0 ? next : nullptr, weights,
                   int(std::min<size_t>(kMaxTileRows, num_rows - row)), scratch.weight_scale.data() + row,
                   scratch.chunk.data() + row * padded + 32 * i, padded);
        }
        if (next) next += (span.last - span.first) * layout_of(cache_.key_kind()).group_bytes;
    }
}

void Attention::attend_chunk(const Sequences& s, const Item& item, size_t layer, size_t chunk, Scratch& scratch) const {
    const size_t group = shape_.group(), num_rows = item.num_tokens * group, start = chunk * kChunk;
    const int32_t* table = s.block_tables + item.sequence * s.max_blocks + chunk * kChunkBlocks;
    const auto visible = [&](size_t row, size_t* low, size_t* high) {   // keys of this chunk, [low, high)
        const size_t position = s.positions[item.token + row / group], end = position + 1;
        const size_t begin = shape_.window && end > shape_.window ? end - shape_.window : 0;
        *low = std::clamp(begin, start, start + kChunk) - start;
        *high = std::clamp(end, start, start + kChunk) - start;
    };
    size_t low, high, unused;
    visible(0, &low, &unused);
    visible(num_rows - 1, &unused, &high);
    const Span span{low / kCacheBlock, (high + kCacheBlock - 1) / kCacheBlock};
    KvCache::Head heads[kChunkBlocks];
    for (size_t b = span.first; b < span.last; b++) heads[b] = cache_.head(layer, table[b], item.kv_head);

    score(heads, span, num_rows, scratch);
    const size_t offset = span.first * kCacheBlock, count = (span.last - span.first) * kCacheBlock;
    for (size_t row = 0; row < num_rows; row++) {
        visible(row, &low, &high);
        low = std::clamp(low, offset, offset + count);
        high = std::clamp(high, low, offset + count);
        ops_.softmax(scratch.scores.data() + row * kChunk + offset, count, low - offset, high - offset,
                     &scratch.chunk_max[row], &scratch.chunk_sum[row]);
    }
    const uint8_t* next = chunk + 1 < item.last_chunk ? cache_.head(layer, table[kChunkBlocks], item.kv_head).keys : nullptr;
    if (cache_.is_quantized()) weigh_quantized(heads, next, span, num_rows, scratch);
    else weigh(heads, span, num_rows, scratch);
}

// Merge the chunk into the running result: both are sums relative to their own maximum.
void Attention::fold(size_t num_rows, Scratch& scratch) const {
    const size_t padded = shape_.padded_dim();
    for (size_t row = 0; row < num_rows; row++) {
        if (scratch.chunk_max[row] == kMinusInfinity) continue;   // this row sees nothing of the chunk
        const float max = std::max(scratch.total_max[row], scratch.chunk_max[row]);
        const float alpha = std::exp(scratch.total_max[row] - max), beta = std::exp(scratch.chunk_max[row] - max);
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

void Attention::attend_item(const Sequences& s, const Item& item, size_t layer, const float* qkv, float* out,
                            Scratch& scratch) {
    const size_t group = shape_.group(), dim = shape_.head_dim, padded = shape_.padded_dim(), num_rows = item.num_tokens * group;
    load_queries(s, item, qkv, scratch);
    if (item.part >= 0) {
        float* part = parts_.data() + item.part * group * (padded + 2);
        for (size_t chunk = item.first_chunk; chunk < item.last_chunk; chunk++) {
            attend_chunk(s, item, layer, chunk, scratch);
            for (size_t row = 0; row < num_rows; row++, part += padded + 2) {
                std::memcpy(part, scratch.chunk.data() + row * padded, padded * sizeof(float));
                part[padded] = scratch.chunk_max[row];
                part[padded + 1] = scratch.chunk_sum[row];
            }
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
    for (size_t row = 0; row < num_rows; row++)
        store(scratch.sum.data() + row * padded, scratch.total_sum[row],
              out + (item.token + row / group) * shape_.query_width() + (item.kv_head * group + row % group) * dim);
}

void Attention::attend(const Sequences& s, size_t layer, const float* qkv, float* out, size_t queue, int thread,
                       WorkQueue& work) {
    size_t item;
    while (work.take(queue, thread, items_.size(), &item)) attend_item(s, items_[item], layer, qkv, out, scratch_[thread]);
}

void Attention::merge(float* out, int thread, int num_threads) const {
    const size_t group = shape_.group(), padded = shape_.padded_dim(), row_size = padded + 2;
    std::vector<float> sum(padded);
    for (size_t m = merges_.size() * thread / num_threads; m < merges_.size() * (thread + 1) / num_threads; m++) {
        const Merge& merge = merges_[m];
        for (size_t g = 0; g < group; g++) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            float total_max = kMinusInfinity, total_sum = 0;
            for (size_t i = 0; i < merge.num_parts; i++) {
                const float* part = parts_.data() + ((merge.first_part + i) * group + g) * row_size;
                if (part[padded] == kMinusInfinity) continue;
                const float max = std::max(total_max, part[padded]);
                const float alpha = std::exp(total_max - max), beta = std::exp(part[padded] - max);
                ops_.blend(alpha, sum.data(), beta, part, padded);
                total_sum = alpha * total_sum + beta * part[padded + 1];
                total_max = max;
            }
            store(sum.data(), total_sum, out + merge.token * shape_.query_width() + (merge.kv_head * group + g) * shape_.head_dim);
        }
    }
}

}  // namespace miniphi
