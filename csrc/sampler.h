// From rows of logits to tokens: masks, biases, penalties, filters, the draw, and log-probabilities.
//
// Chooses what engine/reference_sampler.py chooses, and says there what each step means. A row is read once: the maxima of
// groups of 64 logits tell where the largest ones are, so that only candidates are ever scaled, sorted and put through exp;
// a sum over the whole vocabulary is taken only where top_p, log-probabilities or an unfiltered draw need it. Every sum has a
// fixed order, so the result depends on neither the instruction set nor what else is sampled.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace miniphi {

struct SamplingError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct SamplingOptions {
    float temperature;         // 0 is greedy
    size_t top_k;              // 0 is off
    double top_p;              // 1 is off
    float min_p;               // 0 is off
    float repetition_penalty;  // 1 is off
    float presence_penalty, frequency_penalty;
    std::optional<size_t> num_logprobs;        // alternatives beside the chosen token's
    uint64_t min_tokens;                       // before it `masked_early` applies, after it `masked`
    std::vector<int32_t> masked, masked_early;
    std::vector<std::pair<int32_t, float>> biases;
    uint64_t seed, choice;
};

struct Drawn {
    int32_t token_id;
    double logprob;                                 // of the model itself, before any option; if it was asked for
    std::vector<std::pair<int32_t, double>> best;   // the most likely tokens, likeliest first
};

struct PromptScore {
    double logprob;
    bool is_greedy;
    std::vector<std::pair<int32_t, double>> best;   // as above
};

// Draws the tokens of one sequence and remembers those that the penalties count.
class Sampler {
public:
    Sampler(size_t vocab_size, SamplingOptions options, const std::vector<int32_t>& prompt_ids);

    size_t vocab_size() const { return vocab_size_; }
    const SamplingOptions& options() const { return options_; }
    // Choose the token number `position` of the answer from logits [vocab_size], which are overwritten, and count it.
    // Throws SamplingError for a logit that is not finite, or where everything is masked.
    Drawn sample(float* logits, uint64_t position);
    void observe(int32_t token_id);

private:
    const std::vector<int32_t>& masked_at(uint64_t position) const;
    std::vector<int32_t> edited_ids(uint64_t position) const;
    void edit(float* scores, uint64_t position) const;

    const size_t vocab_size_;
    const SamplingOptions options_;
    std::vector<bool> is_seen_;
    std::vector<int32_t> seen_, counted_;   // distinct ids, for the repetition penalty and for the other two
    std::vector<float> counts_;             // by id
};

// Consecutive rows of logits of one sequence. Row 0 follows its known tokens; row i + 1 follows row i's token if that is
// draft[i], and is left alone otherwise. So one token is drawn, and one more for each draft token that comes true.
struct SampleJob {
    Sampler* sampler;
    float* logits;
    uint64_t position;
    std::vector<int32_t> draft;
    std::vector<Drawn> drawn;

    void run();
};

PromptScore score_token(const float* logits, size_t vocab_size, int32_t token_id, size_t num_best);

// From 0 to below 1 on a grid of 2^-53, of the arguments alone: BLAKE2b (RFC 7693) of the three as little-endian words.
double uniform(uint64_t seed, uint64_t choice, uint64_t position);

}  // namespace miniphi
