// y[rows][N] (+)= x[rows][K] W^T for packed matrices, several of them side by side in y's columns.
//
// Phase one quantises x to int8 once for all matrices that share a group size; phase two hands out column blocks.
// A block's weights stream from memory once and stay in the level-two cache while every tile of rows passes.
//
// A *fine* product gives x two int8 planes, q1 s1 + q2 s2, the second holding what the first left over: an error of
// 1/60000 of a group's maximum instead of 1/250. It costs a second row of products and no more memory traffic, so the
// logits are computed this way.
#pragma once
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "ops.h"
#include "thread_pool.h"

namespace miniphi {

// Memory on huge pages where the system allows: the read rate of weights depends on it. Either anonymous, which starts
// as zeros and costs nothing where it is never touched, or the whole of a file, read-only: then the pages are those of
// the system's file cache, and huge ones where the file was written in whole multiples of them.
class Memory {
public:
    explicit Memory(size_t bytes);
    // Maps the file behind a descriptor, which may be closed afterwards, and makes it present in a thread of its own.
    // Throws std::bad_alloc where the system refuses.
    Memory(int descriptor, size_t bytes);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    uint8_t* data() const { return data_; }
    size_t size() const { return bytes_; }

private:
    void populate();

    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
    std::atomic<bool> stop_{false};
    std::thread populating_;
};

struct PackedMatrix {
    Kind kind;
    size_t rows, depth;   // N, K
    std::shared_ptr<Memory> memory;   // shared with its neighbours
    uint8_t* data;

    size_t num_blocks() const { return (rows + kBlockColumns - 1) / kBlockColumns; }
    uint8_t* block(size_t index) const { return data + index * block_bytes(kind, depth); }
    size_t num_bytes() const { return num_blocks() * block_bytes(kind, depth); }
};

// Packs one matrix after the other into large pieces of memory: small matrices share huge pages.
class Packer {
public:
    explicit Packer(int num_threads) : pool_(num_threads) {}
    // row_order, if given, names the stored row of each logical row. Threads share the blocks.
    std::unique_ptr<PackedMatrix> pack(Kind kind, const uint8_t* stored, size_t rows, size_t depth, const int32_t* row_order);

private:
    ThreadPool pool_;
    std::shared_ptr<Memory> memory_;
    size_t used_ = 0;
};

class Matmul {
public:
    // Scratch for at most max_rows planes of at most max_depth values.
    Matmul(const Ops& ops, size_t max_rows, size_t max_depth) : ops_(ops), max_rows_(max_rows), max_depth_(max_depth) {}
    // Make room for the activations that this matrix is multiplied with; once, before the first call that has it.
    void prepare(const PackedMatrix& matrix);

    struct Call {
        const std::vector<const PackedMatrix*>& matrices;
        const float* x;
        size_t num_rows, x_stride;
        float* y;
        size_t y_stride;
        bool add, fine, gated;
    };
    // Whether a product of these can be gated: the left half of its columns through SiLU times the right half, while both
    // are in the caches. y is half as wide then.
    static bool can_gate(const std::vector<const PackedMatrix*>& matrices);
    void quantize(const Call& call, int thread, int num_threads);
    void multiply(const Call& call, size_t queue, int thread, WorkQueue& work);

private:
    static constexpr int kNumZeros = 4;   // 8, 16, 128 per group; 32 per half group
    struct Activations {                  // of one group size; what QuantRows points to
        size_t group = 0, q_stride = 0;
        std::vector<int8_t> q;
        std::vector<float> scale, scaled_sum;
        std::vector<int32_t> exponent, correction[kNumZeros];
        bool is_wide() const { return group == kWideGroup; }
        float scale_of(size_t row, size_t groups, size_t g) const;
    };
    Activations& activations_of(Kind kind) { return activations_[layout_of(kind).is_wide()]; }
    const Activations& activations_of(Kind kind) const { return activations_[layout_of(kind).is_wide()]; }
    QuantRows rows_for(const PackedMatrix& matrix) const;
    void quantize_rows(const Call& call, Activations& to, const bool* needs, int thread, int num_threads) const;
    void quantize_plane(Activations& to, const bool* needs, const float* x, size_t depth, size_t row, int32_t* sums) const;
    size_t panel_rows(size_t depth) const;
    void multiply_panel(const Call& call, const PackedMatrix& matrix, size_t block, size_t start, size_t count, float* y,
                        size_t y_stride) const;
    void multiply_gated(const Call& call, size_t block, size_t up, std::vector<float>& scratch) const;
    void multiply_edge(const Call& call, const PackedMatrix& matrix, const uint8_t* block, size_t columns, float* y) const;
    void multiply_whole(const Call& call, const PackedMatrix& matrix, size_t first, size_t last, float* y) const;
    void multiply_blocks(const Call& call, const PackedMatrix& matrix, size_t first, size_t last, float* y) const;

    const Ops& ops_;
    const size_t max_rows_, max_depth_;
    Activations activations_[2];          // groups of 32, of 64
};

}  // namespace miniphi
