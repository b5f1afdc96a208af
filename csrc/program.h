// A model as a list of operations, and one call that runs the whole list on a batch.
//
// engine/program.py builds the list once per model. run() executes it on every thread of the pool with a barrier
// between operations; activations live in buffers allocated up front. Results do not depend on the number of threads.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"

namespace miniphi {

class Program {
public:
    Program(const Ops& ops, int num_threads, size_t max_tokens, size_t max_logit_rows, const HeadShape& shape,
            CacheType cache_type, size_t num_cache_blocks);

    // A float32 buffer of max_tokens rows, or of max_logit_rows; returns its id.
    int add_buffer(size_t width, bool of_logit_rows);
    void embed(const PackedMatrix* table, int to);
    void rms_norm(int from, int to, std::vector<float> weight, float eps);
    void matmul(int from, int to, std::vector<const PackedMatrix*> matrices, bool add);
    void rope_and_append(int qkv, size_t layer);
    void attention(int qkv, int to, size_t layer);
    void silu_mul(int gate_up, int to);   // of many rows joined with the product before it, where that can: gate_up stays unwritten
    void take_logit_rows(int from, int to);
    void matmul_to_logits(int from, std::vector<const PackedMatrix*> matrices);

    struct Batch {
        Sequences sequences;
        const int32_t* token_ids;    // [num_tokens]
        const int32_t* logit_rows;   // [num_logit_rows]
        size_t num_logit_rows;
        float* logits;               // [num_logit_rows][vocab]
    };
    void run(const Batch& batch);

    size_t width(int buffer) const { return buffers_.at(buffer).width; }
    const float* buffer(int id) const { return reinterpret_cast<const float*>(buffers_.at(id).memory->data()); }
    size_t max_tokens() const { return max_tokens_; }
    size_t max_logit_rows() const { return max_logit_rows_; }
    size_t logits_width() const { return logits_width_; }
    size_t num_cache_blocks() const { return cache_.num_blocks(); }
    ThreadPool& pool() { return pool_; }
    const Ops& ops() const { return ops_; }
    // Nanoseconds spent per kind of operation on the calling thread since the last call, by name.
    std::vector<std::pair<std::string, uint64_t>> take_profile();

private:
    enum class Code { Embed, RmsNorm, Matmul, Rope, Attention, SiluMul, TakeRows };
    static constexpr int kNumCodes = 7;
    static constexpr int kLogits = -1, kNone = -2;
    struct Op {
        Code code;
        int from, to;   // to = kLogits: the caller's array
        size_t layer = 0;
        bool add = false, joined = false;   // joined: SiLU that the product before it may have done
        int gated_to = kNone;               // where that product writes then
        float eps = 0;
        std::vector<float> weight;
        std::vector<const PackedMatrix*> matrices;
    };
    struct Buffer {
        size_t width;
        bool of_logit_rows;
        std::unique_ptr<Memory> memory;
    };
    float* data(int id) const { return reinterpret_cast<float*>(buffers_[id].memory->data()); }
    void add_matmul(Op op);
    size_t num_rows(const Op& op, const Batch& batch) const;
    void execute(const Op& op, size_t index, const Batch& batch, int thread);
    void run_matmul(const Op& op, size_t index, const Batch& batch, int thread);

    const Ops& ops_;
    ThreadPool pool_;
    const size_t max_tokens_, max_logit_rows_;
    size_t logits_width_ = 0, max_depth_ = 0;
    KvCache cache_;
    Attention attention_;
    std::vector<Buffer> buffers_;
    std::vector<Op> ops_list_;
    std::unique_ptr<Matmul> matmul_;
    std::unique_ptr<WorkQueue> work_;
    std::array<uint64_t, kNumCodes> profile_{};
};

}  // namespace miniphi
