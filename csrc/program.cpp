#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "pack.h"

namespace miniphi {
namespace {

constexpr const char* kCodeNames[] = {"embed", "rms_norm", "matmul", "rope_and_append", "attention", "silu_mul", "take_rows"};

// Up to so many rows SiLU is an operation of its own: a joined product goes to and fro between the weights of gate and up,
// and where memory is the limit every jump costs as much as 20 KB, which the hardware fetched ahead in vain.
constexpr size_t kFewRows = 4;

// The share of `count` units that belongs to a thread.
struct Share {
    size_t first, last;
    Share(size_t count, int thread, int num_threads)
        : first(count * thread / num_threads), last(count * (thread + 1) / num_threads) {}
};

uint64_t now_ns() {
    return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count());
}

}  // namespace

Program::Program(const Ops& ops, int num_threads, size_t max_tokens, size_t max_logit_rows, const HeadShape& shape,
                 CacheType cache_type, size_t num_cache_blocks)
    : ops_(ops),
      pool_(num_threads),
      max_tokens_(max_tokens),
      max_logit_rows_(max_logit_rows),
      cache_(shape, cache_type, num_cache_blocks),
      attention_(ops, shape, cache_, num_threads) {}

int Program::add_buffer(size_t width, bool of_logit_rows) {
    const size_t rows = of_logit_rows ? max_logit_rows_ : max_tokens_;
    buffers_.push_back({width, of_logit_rows, std::make_unique<Memory>(rows * width * sizeof(float))});
    return int(buffers_.size()) - 1;
}

void Program::embed(const PackedMatrix* table, int to) {
    ops_list_.push_back({.code = Code::Embed, .from = to, .to = to, .matrices = {table}});
}

void Program::rms_norm(int from, int to, std::vector<float> weight, float eps) {
    ops_list_.push_back({.code = Code::RmsNorm, .from = from, .to = to, .eps = eps, .weight = std::move(weight)});
}

void Program::add_matmul(Op op) {
    max_depth_ = std::max(max_depth_, op.matrices[0]->depth);
    ops_list_.push_back(std::move(op));
}

void Program::matmul(int from, int to, std::vector<const PackedMatrix*> matrices, bool add) {
    add_matmul({.code = Code::Matmul, .from = from, .to = to, .add = add, .matrices = std::move(matrices)});
}

void Program::matmul_to_logits(int from, std::vector<const PackedMatrix*> matrices) {
    logits_width_ = 0;
    for (const PackedMatrix* matrix : matrices) logits_width_ += matrix->rows;
    add_matmul({.code = Code::Matmul, .from = from, .to = kLogits, .matrices = std::move(matrices)});
}

void Program::rope_and_append(int qkv, size_t layer) {
    ops_list_.push_back({.code = Code::Rope, .from = qkv, .to = qkv, .layer = layer});
}

void Program::attention(int qkv, int to, size_t layer) {
    ops_list_.push_back({.code = Code::Attention, .from = qkv, .to = to, .layer = layer});
}

void Program::silu_mul(int gate_up, int to) {
    Op& last = ops_list_.back();
    const bool joined = last.code == Code::Matmul && last.to == gate_up && !last.add && Matmul::can_gate(last.matrices);
    if (joined) last.gated_to = to;
    ops_list_.push_back({.code = Code::SiluMul, .from = gate_up, .to = to, .joined = joined});
}

void Program::take_logit_rows(int from, int to) {
    ops_list_.push_back({.code = Code::TakeRows, .from = from, .to = to});
}

void Program::run_matmul(const Op& op, size_t index, const Batch& batch, int thread) {
    const size_t rows = num_rows(op, batch);
    const bool to_logits = op.to == kLogits, gated = op.gated_to != kNone && rows > kFewRows;
    const int to = gated ? op.gated_to : op.to;
    const Matmul::Call call{op.matrices, data(op.from), rows, buffers_[op.from].width, to_logits ? batch.logits : data(to),
                            to_logits ? logits_width_ : buffers_[to].width, op.add, to_logits, gated};
    matmul_->quantize(call, thread, pool_.size());
    pool_.barrier().wait();
    matmul_->multiply(call, index, thread, *work_);
}

size_t Program::num_rows(const Op& op, const Batch& batch) const {
    return buffers_[op.from].of_logit_rows ? batch.num_logit_rows : batch.sequences.num_tokens;
}

void Program::execute(const Op& op, size_t index, const Batch& batch, int thread) {
    const Sequences& s = batch.sequences;
    const int num_threads = pool_.size();
    const size_t rows = num_rows(op, batch);
    const Share share(rows, thread, num_threads);
    switch (op.code) {
        case Code::Embed: {
            const PackedMatrix& table = *op.matrices[0];
            for (size_t i = share.first; i < share.last; i++) {
                const size_t id = batch.token_ids[i];
                unpack_column(table.kind, table.block(id / kBlockColumns), id % kBlockColumns, table.depth,
                              data(op.to) + i * table.depth);
            }
            break;
        }
        case Code::RmsNorm: {
            const size_t width = buffers_[op.from].width;
            for (size_t i = share.first; i < share.last; i++)
                ops_.rms_norm(data(op.from) + i * width, op.weight.data(), width, op.eps, data(op.to) + i * width);
            break;
        }
        case Code::Matmul: run_matmul(op, index, batch, thread); break;
        case Code::Rope: attention_.rope_and_append(s, op.layer, data(op.from), thread, num_threads); break;
        case Code::Attention:
            attention_.attend(s, op.layer, data(op.from), data(op.to), index, thread, *work_);
            pool_.barrier().wait();
            attention_.merge(data(op.to), thread, num_threads);
            break;
        case Code::SiluMul: {   // columns are shared out, so that a single row keeps every thread busy
            const size_t width = buffers_[op.to].width;
            const Share columns((width + 15) / 16, thread, num_threads);
            const size_t first = columns.first * 16, last = std::min(columns.last * 16, width);
            for (size_t i = 0; i < rows && first < last; i++) {
                const float* gate = data(op.from) + i * 2 * width + first;
                ops_.silu_mul(gate, gate + width, last - first, data(op.to) + i * width + first);
            }
            break;
        }
        case Code::TakeRows: {
            const size_t width = buffers_[op.from].width;
            const Share taken(batch.num_logit_rows, thread, num_threads);
            for (size_t i = taken.first; i < taken.last; i++)
                std::memcpy(data(op.to) + i * width, data(op.from) + batch.logit_rows[i] * width, width * sizeof(float));
            break;
        }
    }
}

void Program::run(const Batch& batch) {
    if (!matmul_) {
        matmul_ = std::make_unique<Matmul>(ops_, std::max(max_tokens_, 2 * max_logit_rows_), max_depth_);
        for (const Op& op : ops_list_)
            if (op.code == Code::Matmul)
                for (const PackedMatrix* matrix : op.matrices) matmul_->prepare(*matrix);
        work_ = std::make_unique<WorkQueue>(ops_list_.size(), pool_.size());
    }
    work_->reset();
    attention_.plan(batch.sequences);
    pool_.run([&](int thread) {
        uint64_t before = thread == 0 ? now_ns() : 0;
        for (size_t i = 0; i < ops_list_.size(); i++) {
            if (ops_list_[i].joined && num_rows(ops_list_[i], batch) > kFewRows) continue;   // the product before did it
            execute(ops_list_[i], i, batch, thread);
            pool_.barrier().wait();
            if (thread != 0) continue;
            const uint64_t after = now_ns();
            profile_[int(ops_list_[i].code)] += after - before;
            before = after;
        }
    });
}

std::vector<std::pair<std::string, uint64_t>> Program::take_profile() {
    std::vector<std::pair<std::string, uint64_t>> result;
    for (int code = 0; code < kNumCodes; code++) result.emplace_back(kCodeNames[code], profile_[code]);
    profile_.fill(0);
    return result;
}

}  // namespace miniphi
