// The only file that knows Python: check shapes and ranges, unwrap arrays, release the GIL, call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "pack.h"
#include "program.h"
#include "sampler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace miniphi {
namespace {

template <typename T, size_t kDims>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <typename T, size_t kDims>
using ConstArray = Array<const T, kDims>;

void require(bool condition, const std::string& message) {
    if (!condition) throw nb::value_error(message.c_str());
}

std::string text(size_t value) { return std::to_string(value); }

constexpr size_t kLine = 64;   // what blocks are aligned to

Kind checked_kind(int kind) {
    require(kind >= 0 && kind < kNumKinds, "weight format " + std::to_string(kind) + " is unknown");
    return Kind(kind);
}

template <typename T>
nb::object new_array(std::vector<size_t> shape, T** data) {
    size_t size = 1;
    for (size_t n : shape) size *= n;
    *data = new T[size];
    nb::capsule owner(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(*data, shape.size(), shape.data(), owner));
}

// What depth a matrix must be a multiple of.
size_t depth_unit(Kind kind) { return is_quantized(kind) ? (layout_of(kind).super_bytes ? kSuperGroups * kGroup : layout_of(kind).group) : 1; }

std::unique_ptr<PackedMatrix> pack(Packer& packer, int kind_number, ConstArray<uint8_t, 2> stored, size_t depth,
                                   std::optional<ConstArray<int32_t, 1>> row_order) {
    const Kind kind = checked_kind(kind_number);
    const size_t rows = stored.shape(0), unit = depth_unit(kind);
    require(rows > 0 && depth > 0, "a matrix needs rows and columns, got " + text(rows) + " x " + text(depth));
    require(depth % unit == 0, "rows of " + text(depth) + " values are not whole blocks of " + text(unit));
    require(stored.shape(1) == stored_row_bytes(kind, depth),
            "stored rows have " + text(stored.shape(1)) + " bytes, expected " + text(stored_row_bytes(kind, depth)));
    const int32_t* order = nullptr;
    if (row_order) {
        require(row_order->shape(0) == rows, "row_order has " + text(row_order->shape(0)) + " entries for " + text(rows) + " rows");
        order = row_order->data();
        for (size_t i = 0; i < rows; i++) require(order[i] >= 0 && size_t(order[i]) < rows, "row_order is out of range");
    }
    nb::gil_scoped_release release;
    return packer.pack(kind, stored.data(), rows, depth, order);
}

// A matrix that lies packed in a mapped file; everything the file says of it is checked here.
std::unique_ptr<PackedMatrix> map_matrix(const std::shared_ptr<Memory>& file, int kind_number, size_t rows, size_t depth, size_t offset) {
    constexpr size_t kMaxSide = size_t(1) << 28;   // products of two sides stay far below 2^64
    const Kind kind = checked_kind(kind_number);
    require(rows > 0 && depth > 0 && rows <= kMaxSide && depth <= kMaxSide && depth % depth_unit(kind) == 0,
            "no matrix has the shape " + text(rows) + " x " + text(depth));
    auto matrix = std::make_unique<PackedMatrix>(PackedMatrix{kind, rows, depth, file, nullptr});
    require(offset % kLine == 0 && offset <= file->size() && matrix->num_bytes() <= file->size() - offset,
            "a matrix of " + text(matrix->num_bytes()) + " bytes at " + text(offset) + " does not fit the file");
    matrix->data = file->data() + offset;
    return matrix;
}

nb::object packed_bytes(nb::handle_t<PackedMatrix> self) {
    const PackedMatrix& matrix = nb::cast<const PackedMatrix&>(self);
    const size_t shape[1] = {matrix.num_bytes()};
    return nb::cast(nb::ndarray<nb::numpy, const uint8_t>(matrix.data, 1, shape, self));
}

// A number that changes whenever the packed layout of a kind does: a hash of one packed block.
uint64_t layout_fingerprint(int kind_number) {
    const Kind kind = checked_kind(kind_number);
    const size_t depth = kSuperGroups * kGroup, row_bytes = stored_row_bytes(kind, depth);
    std::vector<uint8_t> stored(kBlockColumns * row_bytes), block(block_bytes(kind, depth));
    uint32_t state = 1;
    for (uint8_t& byte : stored) byte = uint8_t((state = state * 1664525u + 1013904223u) >> 24);
    const uint8_t* rows[kBlockColumns];
    for (size_t n = 0; n < kBlockColumns; n++) rows[n] = stored.data() + n * row_bytes;
    pack_block(kind, rows, depth, block.data());
    uint64_t hash = 14695981039346656037u;   // FNV-1a
    for (uint8_t byte : block) hash = (hash ^ byte) * 1099511628211u;
    return hash;
}

nb::object unpack(const PackedMatrix& matrix) {
    float* data;
    nb::object result = new_array<float>({matrix.rows, matrix.depth}, &data);
    nb::gil_scoped_release release;
    for (size_t row = 0; row < matrix.rows; row++)
        unpack_column(matrix.kind, matrix.block(row / kBlockColumns), row % kBlockColumns, matrix.depth, data + row * matrix.depth);
    return result;
}

// One matmul outside a program, for tests and measurements.
nb::object matmul(const std::vector<const PackedMatrix*>& matrices, ConstArray<float, 2> x, bool fine, const std::string& isa,
                  int num_threads) {
    require(!matrices.empty() && num_threads >= 1, "matmul needs a matrix and a thread");
    size_t width = 0;
    for (const PackedMatrix* matrix : matrices) {
        require(matrix->depth == x.shape(1), "x has " + text(x.shape(1)) + " columns, the matrix " + text(matrix->depth));
        width += matrix->rows;
    }
    const Ops& ops = select_ops(isa);
    float* y;
    nb::object result = new_array<float>({x.shape(0), width}, &y);
    nb::gil_scoped_release release;
    ThreadPool pool(num_threads);
    WorkQueue work(1, num_threads);
    Matmul engine(ops, 2 * x.shape(0), x.shape(1));
    for (const PackedMatrix* matrix : matrices) engine.prepare(*matrix);
    const Matmul::Call call{matrices, x.data(), x.shape(0), x.shape(1), y, width, false, fine, false};
    pool.run([&](int thread) {
        engine.quantize(call, thread, num_threads);
        pool.barrier().wait();
        engine.multiply(call, 0, thread, work);
    });
    return result;
}

HeadShape head_shape(const nb::dict& heads) {
    const auto size = [&](const char* name) { return nb::cast<size_t>(heads[name]); };
    const HeadShape shape{size("num_layers"), size("num_heads"), size("num_kv_heads"), size("head_dim"), size("rotary_dim"), size("window")};
    require(shape.num_kv_heads >= 1 && shape.num_heads % shape.num_kv_heads == 0, "kv heads must divide heads");
    require(shape.head_dim % 16 == 0 && shape.head_dim <= 512, "head_dim must be a multiple of 16 up to 512, got " + text(shape.head_dim));
    require(shape.rotary_dim % 2 == 0 && shape.rotary_dim <= shape.head_dim, "rotary_dim must be even and at most head_dim");
    return shape;
}

CacheType checked_cache_type(int type) {
    require(type >= 0 && type < kNumCacheTypes, "unknown cache type");
    return CacheType(type);
}

// Attention of one sequence outside a program, for tests: prefilled `chunk` tokens at a time from an empty cache.
nb::object attention(const std::string& isa, int num_threads, const nb::dict& heads, int cache_type, ConstArray<float, 2> qkv,
                     ConstArray<float, 2> cos, ConstArray<float, 2> sin, size_t chunk) {
    const Ops& ops = select_ops(isa);
    const HeadShape shape = head_shape(heads);
    const size_t tokens = qkv.shape(0), width = shape.query_width() + 2 * shape.kv_width(), half = shape.rotary_dim / 2;
    require(qkv.shape(1) == width && cos.shape(0) == tokens && sin.shape(0) == tokens && cos.shape(1) == half && sin.shape(1) == half,
            "qkv, cos and sin do not fit the heads");
    require(chunk >= 1 && num_threads >= 1, "attention needs a chunk size and a thread");
    float* out;
    nb::object result = new_array<float>({tokens, shape.query_width()}, &out);
    const size_t blocks = (tokens + kCacheBlock - 1) / kCacheBlock;
    const KvCache cache(shape, checked_cache_type(cache_type), blocks);
    nb::gil_scoped_release release;
    std::vector<float> rotated(qkv.data(), qkv.data() + tokens * width);
    std::vector<int32_t> table(blocks), positions(tokens);
    for (size_t i = 0; i < blocks; i++) table[i] = int32_t(blocks - 1 - i);
    for (size_t i = 0; i < tokens; i++) positions[i] = int32_t(i);
    ThreadPool pool(num_threads);
    Attention engine(ops, shape, cache, num_threads);
    for (size_t start = 0; start < tokens; start += chunk) {
        const size_t count = std::min(chunk, tokens - start);
        const int32_t starts[2] = {0, int32_t(count)}, length = int32_t(start + count);
        const Sequences s{count, 1, blocks, positions.data() + start, starts, &length, table.data(), cos.data() + start * half, sin.data() + start * half};
        WorkQueue work(1, num_threads);
        engine.plan(s);
        pool.run([&](int thread) {
            float *rows = rotated.data() + start * width, *to = out + start * shape.query_width();
            engine.rope_and_append(s, 0, rows, thread, num_threads);
            pool.barrier().wait();
            engine.attend(s, 0, rows, to, 0, thread, work);
            pool.barrier().wait();
            engine.merge(to, thread, num_threads);
        });
    }
    return result;
}

nb::object rms_norm(const std::string& isa, ConstArray<float, 2> x, ConstArray<float, 1> weight, float eps) {
    require(x.shape(1) == weight.shape(0), "rms_norm: widths differ");
    float* y;
    nb::object result = new_array<float>({x.shape(0), x.shape(1)}, &y);
    for (size_t i = 0; i < x.shape(0); i++)
        select_ops(isa).rms_norm(x.data() + i * x.shape(1), weight.data(), x.shape(1), eps, y + i * x.shape(1));
    return result;
}

nb::object silu_mul(const std::string& isa, ConstArray<float, 2> gate_up) {
    require(gate_up.shape(1) % 2 == 0, "silu_mul: rows must hold gate and up");
    const size_t width = gate_up.shape(1) / 2;
    float* y;
    nb::object result = new_array<float>({gate_up.shape(0), width}, &y);
    for (size_t i = 0; i < gate_up.shape(0); i++) {
        const float* gate = gate_up.data() + 2 * i * width;
        select_ops(isa).silu_mul(gate, gate + width, width, y + i * width);
    }
    return result;
}

using Positions = ConstArray<int32_t, 1>;

struct Arrays {   // of one batch, as they come from engine/program.py
    Positions token_ids, positions, query_starts, context_lens;
    ConstArray<int32_t, 2> block_tables;
    ConstArray<float, 2> cos, sin;
    Positions logit_rows;
};

void check_batch(const Program& program, const HeadShape& shape, size_t vocab, const Arrays& a) {
    const size_t tokens = a.token_ids.shape(0), sequences = a.context_lens.shape(0);
    require(tokens >= 1 && tokens <= program.max_tokens(),
            "a step holds 1 to " + text(program.max_tokens()) + " tokens, got " + text(tokens));
    require(a.positions.shape(0) == tokens, "positions and token_ids differ in length");
    require(sequences >= 1 && a.query_starts.shape(0) == sequences + 1, "query_starts must have one more entry than context_lens");
    require(a.block_tables.shape(0) == sequences, "block_tables has " + text(a.block_tables.shape(0)) + " rows for " + text(sequences) + " sequences");
    require(a.cos.shape(0) == tokens && a.sin.shape(0) == tokens && a.cos.shape(1) == shape.rotary_dim / 2 && a.sin.shape(1) == shape.rotary_dim / 2,
            "cos and sin must be [tokens, rotary_dim / 2]");
    require(a.logit_rows.shape(0) <= program.max_logit_rows(),
            "a step gives at most " + text(program.max_logit_rows()) + " rows of logits, got " + text(a.logit_rows.shape(0)));
    require(a.query_starts.data()[0] == 0 && size_t(a.query_starts.data()[sequences]) == tokens, "query_starts must run from 0 to the number of tokens");
    for (size_t i = 0; i < tokens; i++)
        require(a.token_ids.data()[i] >= 0 && size_t(a.token_ids.data()[i]) < vocab, "token id " + std::to_string(a.token_ids.data()[i]) + " is outside the vocabulary");
    for (size_t i = 0; i < a.logit_rows.shape(0); i++)
        require(a.logit_rows.data()[i] >= 0 && size_t(a.logit_rows.data()[i]) < tokens, "a logit row is outside the step");
    for (size_t s = 0; s < sequences; s++) {
        const int32_t first = a.query_starts.data()[s], last = a.query_starts.data()[s + 1], length = a.context_lens.data()[s];
        require(first < last, "sequence " + text(s) + " has no tokens in this step");
        const size_t blocks = (size_t(std::max(length, 0)) + kCacheBlock - 1) / kCacheBlock;
        require(length >= last - first && blocks <= a.block_tables.shape(1), "sequence " + text(s) + ": context length " + std::to_string(length) + " does not fit its blocks");
        for (size_t b = 0; b < blocks; b++) {
            const int32_t id = a.block_tables.data()[s * a.block_tables.shape(1) + b];
            require(id >= 0 && size_t(id) < program.num_cache_blocks(), "cache block " + std::to_string(id) + " does not exist");
        }
        for (int32_t t = first; t < last; t++)
            require(a.positions.data()[t] == length - (last - t), "sequence " + text(s) + ": positions must end at its context length");
    }
}

// Owns the packed matrices that its operations point to.
class BoundProgram {
public:
    BoundProgram(const std::string& isa, int num_threads, size_t max_tokens, size_t max_logit_rows, nb::dict heads,
                 int cache_type, size_t num_blocks)
        : shape_(head_shape(heads)) {
        require(num_threads >= 1 && num_threads <= 1024, "num_threads must be 1 to 1024");
        require(max_tokens >= 1 && max_logit_rows >= 1 && num_blocks >= 1, "a program needs room for a token, a row of logits and a cache block");
        program_ = std::make_unique<Program>(select_ops(isa), num_threads, max_tokens, max_logit_rows, shape_, checked_cache_type(cache_type), num_blocks);
    }

    Program& program() { return *program_; }

    int add_buffer(size_t width, bool of_logit_rows) {
        require(width >= 1, "a buffer needs a width");
        return program_->add_buffer(width, of_logit_rows);
    }
    void embed(const PackedMatrix* table, int to) {
        require(table->depth == program_->width(to), "the embedding's width differs from its buffer's");
        vocab_ = table->rows;
        program_->embed(table, to);
    }
    void rms_norm(int from, int to, ConstArray<float, 1> weight, float eps) {
        require(weight.shape(0) == program_->width(from) && program_->width(from) == program_->width(to), "rms_norm: widths differ");
        program_->rms_norm(from, to, std::vector<float>(weight.data(), weight.data() + weight.shape(0)), eps);
    }
    void matmul(int from, int to, const std::vector<const PackedMatrix*>& matrices, bool add) {
        require(check_matrices(from, matrices) == program_->width(to), "matmul: the matrices' rows differ from the output's width");
        program_->matmul(from, to, matrices, add);
    }
    void matmul_to_logits(int from, const std::vector<const PackedMatrix*>& matrices) {
        check_matrices(from, matrices);
        program_->matmul_to_logits(from, matrices);
    }
    void rope_and_append(int qkv, size_t layer) {
        check_heads(qkv, layer);
        program_->rope_and_append(qkv, layer);
    }
    void attention(int qkv, int to, size_t layer) {
        check_heads(qkv, layer);
        require(program_->width(to) == shape_.query_width(), "attention: the output must be as wide as the queries");
        program_->attention(qkv, to, layer);
    }
    void silu_mul(int gate_up, int to) {
        require(program_->width(gate_up) == 2 * program_->width(to), "silu_mul: the input must be twice as wide as the output");
        program_->silu_mul(gate_up, to);
    }
    void take_logit_rows(int from, int to) {
        require(program_->width(from) == program_->width(to), "take_logit_rows: widths differ");
        program_->take_logit_rows(from, to);
    }

    nb::object run(Positions token_ids, Positions positions, Positions query_starts, Positions context_lens,
                   ConstArray<int32_t, 2> block_tables, ConstArray<float, 2> cos, ConstArray<float, 2> sin, Positions logit_rows) {
        const Arrays a{token_ids, positions, query_starts, context_lens, block_tables, cos, sin, logit_rows};
        check_batch(*program_, shape_, vocab_, a);
        float* logits;
        nb::object result = new_array<float>({logit_rows.shape(0), program_->logits_width()}, &logits);
        const Program::Batch batch{{token_ids.shape(0), context_lens.shape(0), block_tables.shape(1), positions.data(), query_starts.data(),
                                    context_lens.data(), block_tables.data(), cos.data(), sin.data()},
                                   token_ids.data(), logit_rows.data(), logit_rows.shape(0), logits};
        nb::gil_scoped_release release;
        program_->run(batch);
        return result;
    }

private:
    size_t check_matrices(int from, const std::vector<const PackedMatrix*>& matrices) const {
        require(!matrices.empty(), "matmul needs a matrix");
        size_t rows = 0;
        for (const PackedMatrix* matrix : matrices) {
            require(matrix->depth == program_->width(from), "matmul: the matrix has " + text(matrix->depth) + " columns, its input " + text(program_->width(from)));
            rows += matrix->rows;
        }
        return rows;
    }
    void check_heads(int qkv, size_t layer) const {
        require(program_->width(qkv) == shape_.query_width() + 2 * shape_.kv_width(), "qkv has the wrong width");
        require(layer < shape_.num_layers, "layer out of range");
    }

    const HeadShape shape_;
    size_t vocab_ = 0;
    std::unique_ptr<Program> program_;
};

std::vector<int32_t> checked_ids(ConstArray<int32_t, 1> ids, size_t vocab_size) {
    for (size_t i = 0; i < ids.shape(0); i++)
        require(ids.data()[i] >= 0 && size_t(ids.data()[i]) < vocab_size, "token id " + std::to_string(ids.data()[i]) + " is outside the vocabulary");
    return {ids.data(), ids.data() + ids.shape(0)};
}

std::unique_ptr<Sampler> new_sampler(size_t vocab_size, float temperature, size_t top_k, double top_p, float min_p, float repetition_penalty,
                                     float presence_penalty, float frequency_penalty, std::optional<size_t> num_logprobs, uint64_t min_tokens,
                                     ConstArray<int32_t, 1> masked, ConstArray<int32_t, 1> masked_early, ConstArray<int32_t, 1> bias_ids,
                                     ConstArray<float, 1> biases, ConstArray<int32_t, 1> prompt_ids, uint64_t seed, uint64_t choice) {
    require(vocab_size >= 1, "a vocabulary needs a token");
    require(bias_ids.shape(0) == biases.shape(0), "bias_ids and biases differ in length");
    SamplingOptions options{temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, num_logprobs, min_tokens,
                            checked_ids(masked, vocab_size), checked_ids(masked_early, vocab_size), {}, seed, choice};
    const std::vector<int32_t> ids = checked_ids(bias_ids, vocab_size);
    for (size_t i = 0; i < ids.size(); i++) options.biases.emplace_back(ids[i], biases.data()[i]);
    return std::make_unique<Sampler>(vocab_size, std::move(options), checked_ids(prompt_ids, vocab_size));
}

void observe(Sampler& sampler, int32_t token_id) {
    require(token_id >= 0 && size_t(token_id) < sampler.vocab_size(), "token id " + std::to_string(token_id) + " is outside the vocabulary");
    sampler.observe(token_id);
}

nb::list as_list(const SampleJob& job) {   // of (token id, its logprob or None, the best as (token id, logprob) or None)
    nb::list result;
    for (const Drawn& drawn : job.drawn) {
        if (!job.sampler->options().num_logprobs) {
            result.append(nb::make_tuple(drawn.token_id, nb::none(), nb::none()));
            continue;
        }
        nb::list best;
        for (const auto& [id, logprob] : drawn.best) best.append(nb::make_tuple(id, logprob));
        result.append(nb::make_tuple(drawn.token_id, drawn.logprob, best));
    }
    return result;
}

nb::list sample(Array<float, 2> logits, const std::vector<Sampler*>& samplers, const std::vector<size_t>& rows, const std::vector<uint64_t>& positions,
                const std::vector<std::vector<int32_t>>& drafts) {
    require(samplers.size() == rows.size() && samplers.size() == positions.size() && samplers.size() == drafts.size(),
            "samplers, rows, positions and drafts differ in length");
    std::vector<SampleJob> jobs;
    size_t free_row = 0;
    for (size_t i = 0; i < samplers.size(); i++) {
        require(samplers[i] != nullptr && samplers[i]->vocab_size() == logits.shape(1), "a sampler's vocabulary is not as wide as the logits");
        require(rows[i] >= free_row && rows[i] + drafts[i].size() < logits.shape(0), "a job's rows of logits do not exist or belong to another");
        free_row = rows[i] + drafts[i].size() + 1;
        jobs.push_back({samplers[i], logits.data() + rows[i] * logits.shape(1), positions[i], drafts[i], {}});
    }
    {
        nb::gil_scoped_release release;
        for (SampleJob& job : jobs) job.run();
    }
    nb::list result;
    for (const SampleJob& job : jobs) result.append(as_list(job));
    return result;
}

using Best = std::vector<std::pair<int32_t, double>>;

std::vector<std::tuple<double, bool, Best>> score_tokens(ConstArray<float, 2> logits, ConstArray<int32_t, 1> token_ids, size_t num_best) {
    require(token_ids.shape(0) <= logits.shape(0), "there are fewer rows of logits than tokens");
    const std::vector<int32_t> ids = checked_ids(token_ids, logits.shape(1));
    std::vector<std::tuple<double, bool, Best>> result;
    nb::gil_scoped_release release;
    for (size_t i = 0; i < ids.size(); i++) {
        PromptScore score = score_token(logits.data() + i * logits.shape(1), logits.shape(1), ids[i], num_best);
        result.emplace_back(score.logprob, score.is_greedy, std::move(score.best));
    }
    return result;
}

// What the machine gives just now, all threads together. It keeps its memory, so that it can be asked between any two
// pieces of work.
class Meter {
public:
    Meter(const std::string& isa, int num_threads, size_t bytes_per_thread)
        : ops_(select_ops(isa)), bytes_per_thread_(bytes_per_thread), pool_(checked_threads(num_threads)), memory_(bytes_per_thread * num_threads) {
        require(bytes_per_thread >= 4096, "Meter: nothing to read");
        pool_.run([&](int thread) {   // touch every page
            for (size_t i = 0; i < bytes_per_thread_; i += 4096) part(thread)[i] = uint8_t(i);
        });
    }
    // Operations of the int8 units, while all of them do nothing else.
    double int8_ops_per_s() {
        std::atomic<uint64_t> done{0};
        const double time = seconds([&](int) { done += ops_.spin_int8(20'000'000); });
        return double(done) / time;
    }
    // Bytes of one contiguous stream a thread.
    double read_bytes_per_s() {
        std::atomic<uint64_t> sink{0};
        const double time = seconds([&](int thread) { sink += ops_.read_bytes(part(thread), bytes_per_thread_); });
        return double(bytes_per_thread_) * pool_.size() / time;
    }

private:
    static int checked_threads(int num_threads) {
        require(num_threads >= 1, "Meter: no threads");
        return num_threads;
    }
    uint8_t* part(int thread) { return memory_.data() + size_t(thread) * bytes_per_thread_; }
    double seconds(const std::function<void(int)>& body) {
        nb::gil_scoped_release release;
        const auto start = std::chrono::steady_clock::now();
        pool_.run(body);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }

    const Ops& ops_;
    const size_t bytes_per_thread_;
    ThreadPool pool_;
    Memory memory_;
};

}  // namespace

NB_MODULE(_native, m) {
    m.def("available_isas", &available_isas);
    m.def("selected_isa", [](const std::string& isa) { return std::string(select_ops(isa).name); }, "isa"_a = "");
    m.def("matmul", &matmul, "matrices"_a, "x"_a.noconvert(), "fine"_a, "isa"_a, "num_threads"_a);
    m.def("attention", &attention, "isa"_a, "num_threads"_a, "heads"_a, "cache_type"_a, "qkv"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "chunk"_a);
    m.def("rms_norm", &rms_norm, "isa"_a, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a);
    m.def("silu_mul", &silu_mul, "isa"_a, "gate_up"_a.noconvert());
    nb::class_<Meter>(m, "Meter")
        .def(nb::init<const std::string&, int, size_t>(), "isa"_a, "num_threads"_a, "bytes_per_thread"_a)
        .def("int8_ops_per_s", &Meter::int8_ops_per_s)
        .def("read_bytes_per_s", &Meter::read_bytes_per_s);
    m.def("cache_block_bytes", [](size_t num_layers, size_t num_kv_heads, size_t head_dim, int type) {
        const HeadShape shape{num_layers, num_kv_heads, num_kv_heads, head_dim, head_dim, 0};
        return num_layers * num_kv_heads * KvCache::head_bytes(shape, checked_cache_type(type));
    });
    nb::class_<Sampler>(m, "Sampler")
        .def(nb::new_(&new_sampler), nb::kw_only(), "vocab_size"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a,
             "presence_penalty"_a, "frequency_penalty"_a, "num_logprobs"_a.none(), "min_tokens"_a, "masked"_a.noconvert(),
             "masked_early"_a.noconvert(), "bias_ids"_a.noconvert(), "biases"_a.noconvert(), "prompt_ids"_a.noconvert(), "seed"_a, "choice"_a)
        .def("observe", &observe, "token_id"_a);
    m.def("sample", &sample, "logits"_a.noconvert(), "samplers"_a, "rows"_a, "positions"_a, "drafts"_a);
    m.def("score_tokens", &score_tokens, "logits"_a.noconvert(), "token_ids"_a.noconvert(), "num_best"_a);
    m.def("uniform", &uniform, "seed"_a, "choice"_a, "position"_a);
    nb::class_<PackedMatrix>(m, "PackedMatrix")
        .def_ro("rows", &PackedMatrix::rows)
        .def_ro("depth", &PackedMatrix::depth)
        .def_prop_ro("kind", [](const PackedMatrix& matrix) { return int(matrix.kind); })
        .def_prop_ro("num_bytes", &PackedMatrix::num_bytes)
        .def_prop_ro("packed_bytes", &packed_bytes)
        .def("unpack", &unpack);
    nb::class_<Memory>(m, "MappedFile")
        .def(nb::new_([](int descriptor, size_t num_bytes) { return std::make_shared<Memory>(descriptor, num_bytes); }),
             "descriptor"_a, "num_bytes"_a)
        .def("matrix", &map_matrix, "kind"_a, "rows"_a, "depth"_a, "offset"_a);
    m.def("layout_fingerprint", &layout_fingerprint, "kind"_a);
    nb::class_<Packer>(m, "Packer")
        .def(nb::init<int>(), "num_threads"_a)
        .def("pack", &pack, "kind"_a, "stored"_a.noconvert(), "depth"_a, "row_order"_a.noconvert().none());
    nb::class_<BoundProgram>(m, "Program")
        .def(nb::init<const std::string&, int, size_t, size_t, nb::dict, int, size_t>(), "isa"_a, "num_threads"_a, "max_tokens"_a,
             "max_logit_rows"_a, "heads"_a, "cache_type"_a, "num_blocks"_a)
        .def("add_buffer", &BoundProgram::add_buffer, "width"_a, "of_logit_rows"_a)
        .def("embed", &BoundProgram::embed, "table"_a, "to"_a, nb::keep_alive<1, 2>())
        .def("rms_norm", &BoundProgram::rms_norm, "source"_a, "to"_a, "weight"_a.noconvert(), "eps"_a)
        .def("matmul", &BoundProgram::matmul, "source"_a, "to"_a, "matrices"_a, "add"_a)
        .def("matmul_to_logits", &BoundProgram::matmul_to_logits, "source"_a, "matrices"_a)
        .def("rope_and_append", &BoundProgram::rope_and_append, "qkv"_a, "layer"_a)
        .def("attention", &BoundProgram::attention, "qkv"_a, "to"_a, "layer"_a)
        .def("silu_mul", &BoundProgram::silu_mul, "gate_up"_a, "to"_a)
        .def("take_logit_rows", &BoundProgram::take_logit_rows, "source"_a, "to"_a)
        .def("run", &BoundProgram::run, "token_ids"_a.noconvert(), "positions"_a.noconvert(), "query_starts"_a.noconvert(),
             "context_lens"_a.noconvert(), "block_tables"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "logit_rows"_a.noconvert())
        .def("take_profile", [](BoundProgram& p) { return p.program().take_profile(); })
        .def_prop_ro("isa", [](BoundProgram& p) { return std::string(p.program().ops().name); })
        .def_prop_ro("num_threads", [](BoundProgram& p) { return p.program().pool().size(); })
        .def_prop_ro("logits_width", [](BoundProgram& p) { return p.program().logits_width(); });
}

}  // namespace miniphi
