#include "matmul.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <system_error>

#include "pack.h"

namespace miniphi {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
// Column blocks that one thread computes together, and how much of the activations passes over them at a time: both
// stay in the level-two cache meanwhile.
constexpr size_t kStripBlocks = 2;
constexpr size_t kPanelBytes = size_t(384) << 10;
constexpr size_t kPackerPiece = size_t(64) << 20;
constexpr size_t kPopulateStep = size_t(16) << 20;

// Which correction array a kind reads, or -1 if its format has a minimum instead of a zero point.
int zero_index(Kind kind) {
    switch (layout_of(kind).zero) {
        case 8: return 0;
        case 16: return 1;
        case 128: return 2;
        case 32: return 3;
        default: return -1;
    }
}

}  // namespace

namespace {

// Address space of whole huge pages, aligned to them.
uint8_t* reserve(size_t bytes, int protection) {
    // One huge page more than needed, to align; then the ends are given back.
    void* raw = mmap(nullptr, bytes + kHugePage, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t start = reinterpret_cast<uintptr_t>(raw), aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > start) munmap(raw, aligned - start);
    const size_t tail = start + kHugePage - aligned;
    if (tail > 0) munmap(reinterpret_cast<void*>(aligned + bytes), tail);
    return reinterpret_cast<uint8_t*>(aligned);
}

size_t whole_huge_pages(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

Memory::Memory(size_t bytes) : data_(reserve(whole_huge_pages(bytes), PROT_READ | PROT_WRITE)), bytes_(whole_huge_pages(bytes)) {
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Memory::Memory(int descriptor, size_t bytes) : data_(reserve(whole_huge_pages(bytes), PROT_NONE)), bytes_(bytes) {
    if (mmap(data_, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED) {
        munmap(data_, whole_huge_pages(bytes));
        throw std::bad_alloc();
    }
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);   // read from the disk in huge pages too
#endif
    try {
        populating_ = std::thread([this] { populate(); });
    } catch (const std::system_error&) {
        // No thread to be had: pages come as they are touched.
    }
}

// In steps, so that it can be ended, and so that nobody who maps something else waits long.
void Memory::populate() {
#ifdef MADV_POPULATE_READ
    for (size_t done = 0; done < bytes_ && !stop_.load(std::memory_order_relaxed); done += kPopulateStep)
        if (madvise(data_ + done, std::min(kPopulateStep, bytes_ - done), MADV_POPULATE_READ) != 0) break;
#else
    madvise(data_, bytes_, MADV_WILLNEED);
#endif
}

Memory::~Memory() {
    stop_ = true;
    if (populating_.joinable()) populating_.join();
    munmap(data_, whole_huge_pages(bytes_));
}

std::unique_ptr<PackedMatrix> Packer::pack(Kind kind, const uint8_t* stored, size_t rows, size_t depth,
                                           const int32_t* row_order) {
    auto matrix = std::make_unique<PackedMatrix>(PackedMatrix{kind, rows, depth, nullptr, nullptr});
    const size_t row_bytes = stored_row_bytes(kind, depth), bytes = matrix->num_bytes();
    if (!memory_ || used_ + bytes > memory_->size()) {
        memory_ = std::make_shared<Memory>(std::max(bytes, kPackerPiece));
        used_ = 0;
    }
    matrix->memory = memory_;
    matrix->data = memory_->data() + used_;
    used_ += (bytes + 63) / 64 * 64;
    WorkQueue work(1, pool_.size());
    pool_.run([&](int thread) {
        size_t block;
        while (work.take(0, thread, matrix->num_blocks(), &block)) {
            const uint8_t* pointers[kBlockColumns];
            for (size_t n = 0; n < kBlockColumns; n++) {
                const size_t row = block * kBlockColumns + n;
                const size_t source = row < rows && row_order ? size_t(row_order[row]) : row;
                pointers[n] = row < rows ? stored + source * row_bytes : nullptr;
            }
            pack_block(kind, pointers, depth, matrix->block(block));
        }
    });
    return matrix;
}

void Matmul::prepare(const PackedMatrix& matrix) {
    if (!is_quantized(matrix.kind)) return;
    Activations& a = activations_of(matrix.kind);
    if (a.group == 0) {
        a.group = layout_of(matrix.kind).group;
        a.q_stride = (max_depth_ + 63) / 64 * 64 + 64;   // an odd number of lines: rows do not share cache sets
        a.q.resize(max_rows_ * a.q_stride);
    }
    const size_t num_groups = max_rows_ * ((max_depth_ + a.group - 1) / a.group);
    a.scale.resize(a.is_wide() ? max_rows_ : num_groups);
    if (a.is_wide()) a.exponent.resize(num_groups);
    else a.scaled_sum.resize(num_groups);
    const int zero = zero_index(matrix.kind);
    if (zero >= 0) a.correction[zero].resize(num_groups * (zero == 3 ? 2 : 1));
}

float Matmul::Activations::scale_of(size_t row, size_t groups, size_t g) const {
    return is_wide() ? std::ldexp(scale[row], exponent[row * groups + g] >> kExponentShift) : scale[row * groups + g];
}

QuantRows Matmul::rows_for(const PackedMatrix& matrix) const {
    const Activations& a = activations_of(matrix.kind);
    const size_t groups = matrix.depth / a.group;
    const int zero = zero_index(matrix.kind);
    return {a.q.data(), a.scale.data(), a.exponent.data(), a.correction[std::max(zero, 0)].data(), a.scaled_sum.data(),
            a.q_stride, a.is_wide() ? 1 : groups, groups * (zero == 3 ? 2 : 1), groups};
}

void Matmul::quantize(const Call& call, int thread, int num_threads) {
    for (Activations& to : activations_) {
        bool any = false, needs[kNumZeros] = {};
        for (const PackedMatrix* matrix : call.matrices) {
            if (!is_quantized(matrix->kind) || &activations_of(matrix->kind) != &to) continue;
            any = true;
            if (zero_index(matrix->kind) >= 0) needs[zero_index(matrix->kind)] = true;
        }
        if (any) quantize_rows(call, to, needs, thread, num_threads);
    }
}

void Matmul::quantize_rows(const Call& call, Activations& to, const bool* needs, int thread, int num_threads) const {
    const size_t depth = call.matrices[0]->depth, planes = call.fine ? 2 : 1, groups = depth / to.group;
    std::vector<int32_t> sums(depth / 16);
    std::vector<float> rest(call.fine ? depth : 0);
    for (size_t row = call.num_rows * thread / num_threads; row < call.num_rows * (thread + 1) / num_threads; row++) {
        const float* x = call.x + row * call.x_stride;
        quantize_plane(to, needs, x, depth, planes * row, sums.data());
        if (!call.fine) continue;
        const int8_t* q = to.q.data() + planes * row * to.q_stride;
        for (size_t g = 0; g < groups; g++) {
            const float scale = to.scale_of(planes * row, groups, g);
            for (size_t k = g * to.group; k < (g + 1) * to.group; k++) rest[k] = x[k] - float(q[k]) * scale;
        }
        quantize_plane(to, needs, rest.data(), depth, planes * row + 1, sums.data());
    }
}

void Matmul::quantize_plane(Activations& to, const bool* needs, const float* x, size_t depth, size_t row, int32_t* sums) const {
    const size_t groups = depth / to.group, parts = to.group / 16;
    int8_t* q = to.q.data() + row * to.q_stride;
    if (to.is_wide()) to.scale[row] = ops_.quantize_wide(x, depth, q, to.exponent.data() + row * groups, sums);
    else ops_.quantize_row(x, depth, q, to.scale.data() + row * groups, sums);
    if (needs[3])
        for (size_t g = 0; g < 2 * groups; g++) to.correction[3][row * 2 * groups + g] = -32 * sums[g];
    for (size_t g = 0; g < groups; g++) {
        int32_t sum = 0;
        for (size_t i = 0; i < parts; i++) sum += sums[parts * g + i];
        if (!to.is_wide()) to.scaled_sum[row * groups + g] = to.scale[row * groups + g] * float(sum);
        sums[g] = sum;
    }
    constexpr int zeros[3] = {8, 16, 128};
    for (int zero = 0; zero < 3; zero++) {
        if (!needs[zero]) continue;
        int32_t* correction = to.correction[zero].data() + row * groups;
        for (size_t g = 0; g < groups; g++) correction[g] = -zeros[zero] * sums[g];
    }
}

// The tiles of a block share out the lines of what comes next, so that memory is never idle: every num_tiles-th bit.
// Few rows for the bits of their weights are all memory, and the hardware's own prefetching serves them better.
static Prefetch prefetch_share(const PackedMatrix& matrix, const uint8_t* block, size_t num_rows, size_t num_tiles, size_t tile) {
    Prefetch prefetch{block + block_bytes(matrix.kind, matrix.depth), 0};
    if (2 * num_rows > size_t(layout_of(matrix.kind).bits))
        for (size_t line = tile; line < 32; line += num_tiles) prefetch.lines |= 1u << line;
    return prefetch;
}

// How many rows of the activations pass over a strip at a time.
size_t Matmul::panel_rows(size_t depth) const {
    const size_t tile = ops_.tile_rows;
    return std::max(tile, kPanelBytes / depth / tile * tile);
}

// Rows [start, start + count) of the activations times one block; y is where their sums go.
void Matmul::multiply_panel(const Call& call, const PackedMatrix& matrix, size_t block, size_t start, size_t count, float* y,
                            size_t y_stride) const {
    const QuantRows a = rows_for(matrix);
    const uint8_t* weights = matrix.block(block);
    const size_t num_tiles = (count + ops_.tile_rows - 1) / ops_.tile_rows;
    for (size_t tile = 0; tile < num_tiles; tile++) {
        const size_t row = count * tile / num_tiles, rows = count * (tile + 1) / num_tiles - row;
        const Prefetch prefetch = start == 0 ? prefetch_share(matrix, weights, call.num_rows, num_tiles, tile) : Prefetch{nullptr, 0};
        ops_.tile[int(matrix.kind)](weights, prefetch, a, start + row, int(rows), y + row * y_stride, y_stride, call.add);
    }
}

bool Matmul::can_gate(const std::vector<const PackedMatrix*>& matrices) {
    size_t rows = 0;
    for (const PackedMatrix* matrix : matrices) {
        if (!is_quantized(matrix->kind) || matrix->rows % kBlockColumns) return false;
        rows += matrix->rows;
    }
    return rows % (2 * kBlockColumns) == 0;
}

// Block `block` of the half as wide result: the product's block of the same number is the gate, `up` the other factor.
void Matmul::multiply_gated(const Call& call, size_t block, size_t up, std::vector<float>& scratch) const {
    const size_t panel = std::min(panel_rows(call.matrices[0]->depth), call.num_rows);
    scratch.resize(2 * panel * kBlockColumns);   // gate, then up
    for (size_t start = 0; start < call.num_rows; start += panel) {
        const size_t count = std::min(panel, call.num_rows - start);
        float* y = scratch.data();
        for (size_t index : {block, up}) {
            const auto* matrix = call.matrices.data();
            for (; index >= (*matrix)->num_blocks(); matrix++) index -= (*matrix)->num_blocks();
            multiply_panel(call, **matrix, index, start, count, y, kBlockColumns);
            y += panel * kBlockColumns;
        }
        for (size_t i = 0; i < count; i++) {
            const float* gate = scratch.data() + i * kBlockColumns;
            ops_.silu_mul(gate, gate + panel * kBlockColumns, kBlockColumns,
                          call.y + (start + i) * call.y_stride + block * kBlockColumns);
        }
    }
}

void Matmul::multiply_edge(const Call& call, const PackedMatrix& matrix, const uint8_t* block, size_t columns, float* y) const {
    const bool quantized = is_quantized(matrix.kind);
    const QuantRows a = quantized ? rows_for(matrix) : QuantRows{};
    const size_t planes = call.fine && quantized ? 2 : 1;
    const size_t limit = quantized ? ops_.tile_rows / planes : kMaxPanelRows, num_tiles = (call.num_rows + limit - 1) / limit;
    float edge[std::max(kMaxTileRows, kMaxPanelRows) * kBlockColumns];
    for (size_t tile = 0; tile < num_tiles; tile++) {
        const size_t row = call.num_rows * tile / num_tiles, rows = call.num_rows * (tile + 1) / num_tiles - row;
        if (quantized) {
            const Prefetch prefetch = prefetch_share(matrix, block, planes * call.num_rows, num_tiles, tile);
            ops_.tile[int(matrix.kind)](block, prefetch, a, planes * row, int(planes * rows), edge, kBlockColumns, false);
        } else {
            ops_.panel[int(matrix.kind)](call.x + row * call.x_stride, call.x_stride, int(rows), block, matrix.depth, edge,
                                         kBlockColumns, false);
        }
        for (size_t i = 0; i < rows; i++)
            for (size_t n = 0; n < columns; n++) {
                const float* from = edge + planes * i * kBlockColumns + n;
                const float sum = planes == 2 ? from[0] + from[kBlockColumns] : from[0];
                float& value = y[(row + i) * call.y_stride + n];
                value = call.add ? value + sum : sum;
            }
    }
}

// Blocks [first, last), none of which needs an edge. With the rows of one tile, next to nothing comes between one block's weights
// and the next one's: whatever the processor does there, it does instead of reading ahead.
void Matmul::multiply_whole(const Call& call, const PackedMatrix& matrix, size_t first, size_t last, float* y) const {
    if (call.num_rows <= size_t(ops_.tile_rows)) {
        const QuantRows a = rows_for(matrix);
        const auto tile = ops_.tile[int(matrix.kind)];
        const size_t bytes = block_bytes(matrix.kind, matrix.depth);
        Prefetch prefetch = prefetch_share(matrix, matrix.block(first), call.num_rows, 1, 0);
        for (y += first * kBlockColumns; first < last; first++, y += kBlockColumns, prefetch.next += bytes)
            tile(prefetch.next - bytes, prefetch, a, 0, int(call.num_rows), y, call.y_stride, call.add);
        return;
    }
    const size_t panel = panel_rows(matrix.depth);
    for (; first < last; first += kStripBlocks)
        for (size_t start = 0; start < call.num_rows; start += panel)
            for (size_t block = first; block < std::min(first + kStripBlocks, last); block++)
                multiply_panel(call, matrix, block, start, std::min(panel, call.num_rows - start),
                               y + start * call.y_stride + block * kBlockColumns, call.y_stride);
}

void Matmul::multiply_blocks(const Call& call, const PackedMatrix& matrix, size_t first, size_t last, float* y) const {
    const size_t whole = call.fine ? first : std::min(last, matrix.rows / kBlockColumns);   // the blocks that need no edge
    if (is_quantized(matrix.kind)) {
        multiply_whole(call, matrix, first, whole, y);
    } else {
        for (size_t block = first; block < whole; block++)
            for (size_t row = 0; row < call.num_rows; row += kMaxPanelRows)
                ops_.panel[int(matrix.kind)](call.x + row * call.x_stride, call.x_stride,
                                             int(std::min<size_t>(kMaxPanelRows, call.num_rows - row)), matrix.block(block),
                                             matrix.depth, y + row * call.y_stride + block * kBlockColumns, call.y_stride, call.add);
    }
    for (size_t block = whole; block < last; block++)
        multiply_edge(call, matrix, matrix.block(block), std::min(kBlockColumns, matrix.rows - block * kBlockColumns),
                      y + block * kBlockColumns);
}

void Matmul::multiply(const Call& call, size_t queue, int thread, WorkQueue& work) {
    size_t first, last, total = 0;
    for (const PackedMatrix* matrix : call.matrices) total += matrix->num_blocks();
    std::vector<float> scratch;
    while (work.take_run(queue, thread, call.gated ? total / 2 : total, &first, &last)) {
        if (call.gated) {
            for (size_t block = first; block < last; block++) multiply_gated(call, block, total / 2 + block, scratch);
            continue;
        }
        float* y = call.y;
        size_t start = 0;   // the number of the matrix's first block
        for (const PackedMatrix* matrix : call.matrices) {
            const size_t end = start + matrix->num_blocks();
            if (std::max(first, start) < std::min(last, end))
                multiply_blocks(call, *matrix, std::max(first, start) - start, std::min(last, end) - start, y);
            start = end;
            y += matrix->rows;
        }
    }
}

}  // namespace miniphi
