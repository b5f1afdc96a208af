#include "sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "vectors.h"

namespace miniphi {
namespace {

constexpr size_t kGroup = 64;             // logits whose maximum is kept
constexpr size_t kFirstCandidates = 64;   // ranked at first where no top_k bounds them; nearly every draw ends among them
constexpr size_t kCandidateGrowth = 8;
constexpr float kMinTemperature = 1e-30f;   // dividing by less overflows, and changes nothing
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87. Cody-Waite reduction and the polynomial of Cephes' expf.
INLINE Floats exp_nonpositive(Floats x) {
    constexpr float kLowest = -87.0f, kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kRound = 12582912.0f;   // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits
    const Floats lowest = Floats{} + kLowest, clamped = larger(x, lowest);
    const Floats shifted = clamped * kLog2E + kRound, n = shifted - kRound;
    const Floats r = (clamped - n * kLn2High) - n * kLn2Low;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Words bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    Floats result;
    std::memcpy(&result, &bits, sizeof result);
    return x < lowest ? Floats{} : result;
}

// How a logit becomes the score that is ranked and put through exp.
struct Scale {
    float peak, temperature;
    INLINE float operator()(float logit) const { return (logit - peak) / temperature; }
    INLINE Floats operator()(Floats logits) const { return (logits - peak) / temperature; }
};
constexpr Scale kUnscaled{0.0f, 1.0f};

// exp of a score, as the vectors compute it.
float exp_nonpositive(float x) { return exp_nonpositive(Floats{} + x)[0]; }

// The sum of exp(score) of all logits, of which the largest score is 0.
WIDE_CLONE double sum_exp(const float* logits, size_t size, const float* maxima, Scale scale) {
    constexpr float kNegligible = -49.0f;   // exp of it times any vocabulary is below the rounding of a float64 sum of 1
    Doubles even{}, odd{};
    double rest = 0;
    for (size_t first = 0; first < size; first += kGroup) {
        if (scale(maxima[first / kGroup]) < kNegligible) continue;
        const float* from = logits + first;
        const size_t num = std::min(kGroup, size - first);
        size_t i = 0;
        for (; i + 2 * kLanes <= num; i += 2 * kLanes) {
            even += __builtin_convertvector(exp_nonpositive(scale(load(from + i))), Doubles);
            odd += __builtin_convertvector(exp_nonpositive(scale(load(from + i + kLanes))), Doubles);
        }
        for (; i < num; i++) rest += exp_nonpositive(Floats{} + scale(from[i]))[0];
    }
    even += odd;
    for (size_t lane = 0; lane < kLanes; lane++) rest += even[lane];
    return rest;
}

double log_sum_exp(const float* logits, size_t size, const std::vector<float>& maxima) {
    const float peak = *std::max_element(maxima.begin(), maxima.end());
    return double(peak) + std::log(sum_exp(logits, size, maxima.data(), {peak, 1.0f}));
}

float group_maximum(const float* logits, size_t size, size_t group) {
    const size_t first = group * kGroup, last = std::min(first + kGroup, size);
    return *std::max_element(logits + first, logits + last);
}

// The largest logit of each whole group; returns 0 if all logits of these groups are finite, NaN otherwise.
WIDE_CLONE float find_group_maxima(const float* logits, size_t num_groups, float* maxima) {
    Floats bad{};   // x * 0 is 0 for a finite x and NaN for any other
    for (size_t group = 0; group < num_groups; group++) {
        const float* from = logits + group * kGroup;
        Floats largest = load(from), other = load(from + kLanes), invalid = largest * 0.0f, also_invalid = other * 0.0f;
        for (size_t i = 2 * kLanes; i < kGroup; i += 2 * kLanes) {
            const Floats x = load(from + i), y = load(from + i + kLanes);
            largest = larger(largest, x);
            other = larger(other, y);
            invalid += x * 0.0f;
            also_invalid += y * 0.0f;
        }
        bad += invalid + also_invalid;
        largest = larger(largest, other);
        float m = largest[0];
        for (size_t lane = 1; lane < kLanes; lane++) m = std::max(m, largest[lane]);
        maxima[group] = m;
    }
    float total = 0;
    for (size_t lane = 0; lane < kLanes; lane++) total += bad[lane];
    return total;
}

// The largest logit of each group, the last one perhaps not whole.
// Throws SamplingError if a logit is not finite.
std::vector<float> find_maxima(const float* logits, size_t size) {
    std::vector<float> maxima((size + kGroup - 1) / kGroup);
    const size_t num_whole = size / kGroup;
    float bad = find_group_maxima(logits, num_whole, maxima.data());
    for (size_t i = num_whole * kGroup; i < size; i++) bad += logits[i] * 0.0f;
    if (num_whole < maxima.size()) maxima[num_whole] = group_maximum(logits, size, num_whole);
    if (bad == 0.0f) return maxima;
    const auto count = std::count_if(logits, logits + size, [](float x) { return !std::isfinite(x); });
    throw SamplingError("the model returned " + std::to_string(count) + " logits of " + std::to_string(size) +
                        " that are not finite numbers; its weights are damaged or its activations overflowed");
}

[[noreturn]] void throw_nothing_left() {
    throw SamplingError("every token of the vocabulary is masked, so none can be sampled; check the unused and stop ids");
}

// Find the maxima again of those groups in which a logit was changed.
void refresh_maxima(const float* logits, size_t size, const std::vector<int32_t>& changed, std::vector<float>& maxima) {
    if (changed.empty()) return;
    std::vector<bool> is_stale(maxima.size());
    for (int32_t id : changed) is_stale[size_t(id) / kGroup] = true;
    for (size_t group = 0; group < maxima.size(); group++)
        if (is_stale[group]) maxima[group] = group_maximum(logits, size, group);
}

// The lowest id among the largest logits.
size_t find_largest(const float* logits, size_t size, const std::vector<float>& maxima) {
    const size_t group = size_t(std::max_element(maxima.begin(), maxima.end()) - maxima.begin());
    const size_t first = group * kGroup, last = std::min(first + kGroup, size);
    return size_t(std::max_element(logits + first, logits + last) - logits);
}

struct Candidate {
    float score;
    int32_t token_id;
    bool operator<(const Candidate& other) const {
        return score > other.score || (score == other.score && token_id < other.token_id);
    }
};

// The `count` largest scores, largest first, equals by rising id.
std::vector<Candidate> rank(const float* logits, size_t size, const std::vector<float>& maxima, size_t count, const Scale& scale) {
    // The count-th largest of the groups' maxima is at most the count-th largest logit, and not far below it.
    float smallest = kMinusInfinity;
    if (count < maxima.size()) {
        std::vector<float> ordered = maxima;
        std::nth_element(ordered.begin(), ordered.begin() + count - 1, ordered.end(), std::greater<float>());
        smallest = ordered[count - 1];
    }
    smallest = scale(smallest);   // logits that differ may be equal once they are scaled: compare scores, as the sort does
    std::vector<Candidate> ranked;
    ranked.reserve(count < maxima.size() ? 4 * count : size);
    for (size_t group = 0; group < maxima.size(); group++) {
        if (scale(maxima[group]) < smallest) continue;
        const size_t first = group * kGroup, num = std::min(kGroup, size - first);
        float scores[kGroup];
        for (size_t i = 0; i < num; i++) scores[i] = scale(logits[first + i]);
        for (size_t i = 0; i < num; i++)
            if (scores[i] >= smallest) ranked.push_back({scores[i], int32_t(first + i)});
    }
    if (ranked.size() > count) {
        std::nth_element(ranked.begin(), ranked.begin() + count, ranked.end());
        ranked.resize(count);
    }
    std::sort(ranked.begin(), ranked.end());
    return ranked;
}

// Candidates that top_p and min_p keep; one more than there are if the end is not among them.
size_t count_kept(const std::vector<double>& cumulative, const std::vector<float>& weights, double total, const SamplingOptions& options) {
    size_t kept = weights.size() + 1;
    if (options.top_p < 1) {
        const auto end = std::lower_bound(cumulative.begin(), cumulative.end(), options.top_p * total);
        kept = std::min(kept, size_t(end - cumulative.begin()) + 1);
    }
    if (options.min_p > 0 && weights.back() < options.min_p) {
        const auto end = std::lower_bound(weights.begin(), weights.end(), options.min_p, std::greater_equal<float>());
        kept = std::min(kept, size_t(end - weights.begin()));
    }
    return kept;
}

int32_t draw(const float* logits, size_t size, const std::vector<float>& maxima, float peak, const SamplingOptions& options, double chance) {
    const Scale scale{peak, std::max(options.temperature, kMinTemperature)};
    const size_t limit = options.top_k == 0 ? size : std::min(options.top_k, size);
    const bool is_filtered = options.top_p < 1 || options.min_p > 0;
    const bool needs_total = limit == size && (options.top_p < 1 || !is_filtered);
    double total = needs_total ? sum_exp(logits, size, maxima.data(), scale) : 0.0;
    std::vector<float> weights;
    std::vector<double> cumulative;
    for (size_t count = limit == size ? std::min(kFirstCandidates, limit) : limit;; count = std::min(count * kCandidateGrowth, limit)) {
        const std::vector<Candidate> ranked = rank(logits, size, maxima, count, scale);
        weights.resize(count);
        cumulative.resize(count);
        double sum = 0;
        for (size_t i = 0; i < count; i++) {
            weights[i] = exp_nonpositive(ranked[i].score);
            cumulative[i] = sum += weights[i];
        }
        if (count == limit) total = sum;
        const size_t kept = count_kept(cumulative, weights, total, options);
        if (kept > count && count < limit && is_filtered) continue;
        const double mass = kept <= count ? cumulative[kept - 1] : total;
        const auto place = std::upper_bound(cumulative.begin(), cumulative.end(), chance * mass);
        if (place != cumulative.end()) return ranked[size_t(place - cumulative.begin())].token_id;
        if (count == limit) throw_nothing_left();
    }
}

// BLAKE2b's compression of one last block (RFC 7693, 3.2).
constexpr uint64_t kInitial[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                  0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
constexpr uint8_t kOrder[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

uint64_t rotate_right(uint64_t x, int bits) { return x >> bits | x << (64 - bits); }

void mix(uint64_t* v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x;
    v[d] = rotate_right(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = rotate_right(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = rotate_right(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = rotate_right(v[b] ^ v[c], 63);
}

}  // namespace

double uniform(uint64_t seed, uint64_t choice, uint64_t position) {
    const uint64_t message[16] = {seed, choice, position};
    const uint64_t first = kInitial[0] ^ 0x01010000 ^ 8;   // no key, a digest of 8 bytes
    uint64_t v[16];
    std::copy(kInitial, kInitial + 8, v);
    std::copy(kInitial, kInitial + 8, v + 8);
    v[0] = first;
    v[12] ^= sizeof(uint64_t) * 3;   // bytes of the message
    v[14] = ~v[14];                  // the last block
    for (int round = 0; round < 12; round++) {
        const uint8_t* s = kOrder[round % 10];
        for (int i = 0; i < 4; i++) mix(v, i, 4 + i, 8 + i, 12 + i, message[s[2 * i]], message[s[2 * i + 1]]);
        for (int i = 0; i < 4; i++) mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, message[s[8 + 2 * i]], message[s[9 + 2 * i]]);
    }
    return double((first ^ v[0] ^ v[8]) >> 11) * 0x1p-53;
}

Sampler::Sampler(size_t vocab_size, SamplingOptions options, const std::vector<int32_t>& prompt_ids)
    : vocab_size_(vocab_size), options_(std::move(options)) {
    if (options_.repetition_penalty != 1) is_seen_.resize(vocab_size);
    for (int32_t id : prompt_ids)
        if (!is_seen_.empty() && !is_seen_[id]) is_seen_[id] = true, seen_.push_back(id);
    if (options_.presence_penalty != 0 || options_.frequency_penalty != 0) counts_.resize(vocab_size);
}

void Sampler::observe(int32_t token_id) {
    if (!is_seen_.empty() && !is_seen_[token_id]) is_seen_[token_id] = true, seen_.push_back(token_id);
    if (!counts_.empty() && counts_[token_id]++ == 0) counted_.push_back(token_id);
}

const std::vector<int32_t>& Sampler::masked_at(uint64_t position) const {
    return position < options_.min_tokens ? options_.masked_early : options_.masked;
}

std::vector<int32_t> Sampler::edited_ids(uint64_t position) const {
    std::vector<int32_t> ids = masked_at(position);
    for (const auto& [id, bias] : options_.biases) ids.push_back(id);
    ids.insert(ids.end(), seen_.begin(), seen_.end());
    ids.insert(ids.end(), counted_.begin(), counted_.end());
    return ids;
}

void Sampler::edit(float* scores, uint64_t position) const {
    for (int32_t id : masked_at(position)) scores[id] = kMinusInfinity;
    for (const auto& [id, bias] : options_.biases) scores[id] += bias;
    const float penalty = options_.repetition_penalty;
    for (int32_t id : seen_) scores[id] = scores[id] > 0 ? scores[id] / penalty : scores[id] * penalty;
    for (int32_t id : counted_) scores[id] -= options_.presence_penalty + options_.frequency_penalty * counts_[id];
}

// The most likely tokens and their log-probabilities, likeliest first.
static std::vector<std::pair<int32_t, double>> find_best(const float* logits, size_t vocab_size, const std::vector<float>& maxima,
                                                         double log_total, size_t count) {
    std::vector<std::pair<int32_t, double>> best;
    if (count == 0) return best;
    for (const Candidate& c : rank(logits, vocab_size, maxima, std::min(count, vocab_size), kUnscaled))
        best.emplace_back(c.token_id, double(c.score) - log_total);
    return best;
}

Drawn Sampler::sample(float* logits, uint64_t position) {
    std::vector<float> maxima = find_maxima(logits, vocab_size_);
    Drawn drawn{};
    double log_total = 0;
    if (options_.num_logprobs) {
        log_total = log_sum_exp(logits, vocab_size_, maxima);
        drawn.best = find_best(logits, vocab_size_, maxima, log_total, *options_.num_logprobs);
    }
    const std::vector<int32_t> edited = edited_ids(position);
    std::vector<float> originals;
    for (int32_t id : edited) originals.push_back(logits[id]);
    edit(logits, position);
    refresh_maxima(logits, vocab_size_, edited, maxima);
    const float peak = *std::max_element(maxima.begin(), maxima.end());
    if (peak == kMinusInfinity) throw_nothing_left();
    drawn.token_id = options_.temperature == 0
        ? int32_t(find_largest(logits, vocab_size_, maxima))
        : draw(logits, vocab_size_, maxima, peak, options_, uniform(options_.seed, options_.choice, position));
    if (options_.num_logprobs) {
        const auto place = std::find(edited.begin(), edited.end(), drawn.token_id);
        drawn.logprob = (place == edited.end() ? logits[drawn.token_id] : originals[size_t(place - edited.begin())]) - log_total;
    }
    observe(drawn.token_id);
    return drawn;
}

void SampleJob::run() {
    for (size_t row = 0; row <= draft.size(); row++) {
        drawn.push_back(sampler->sample(logits + row * sampler->vocab_size(), position + row));
        if (row == draft.size() || drawn.back().token_id != draft[row]) return;
    }
}

PromptScore score_token(const float* logits, size_t vocab_size, int32_t token_id, size_t num_best) {
    const std::vector<float> maxima = find_maxima(logits, vocab_size);
    const double log_total = log_sum_exp(logits, vocab_size, maxima);
    return {double(logits[token_id]) - log_total, find_largest(logits, vocab_size, maxima) == size_t(token_id),
            find_best(logits, vocab_size, maxima, log_total, num_best)};
}

}  // namespace miniphi
