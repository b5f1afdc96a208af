#include "matmul.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <system_error>

#include "pack.h"

namespace miniphi {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
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

Matmul::Matmul(const Ops& ops, size_t max_rows, size_t max_depth)
    : ops_(ops),
      q_stride_((max_depth + 63) / 64 * 64 + 64),   // an odd number of lines: rows do not share cache sets
      groups_((max_depth + kGroup - 1) / kGroup),
      q_(max_rows * q_stride_),
      scale_(max_rows * groups_),
      scaled_sum_(max_rows * groups_) {
    for (int zero = 0; zero < kNumZeros; zero++) correction_[zero].resize(max_rows * groups_ * (zero == 3 ? 2 : 1));
}

QuantRows Matmul::rows_for(const PackedMatrix& matrix) const {
    const size_t groups = matrix.depth / kGroup;
    const int zero = zero_index(matrix.kind);
    const std::vector<int32_t>& correction = correction_[std::max(zero, 0)];
    return {q_.data(), scale_.data(), correction.data(), scaled_sum_.data(), q_stride_, groups, groups * (zero == 3 ? 2 : 1)};
}

void Matmul::quantize(const Call& call, int thread, int num_threads) {
    bool any = false, needs[kNumZeros] = {};
    for (const PackedMatrix* matrix : call.matrices) {
        if (!is_quantized(matrix->kind)) continue;
        any = true;
        if (zero_index(matrix->kind) >= 0) needs[zero_index(matrix->kind)] = true;
    }
    if (!any) return;
    const size_t depth = call.matrices[0]->depth, planes = call.fine ? 2 : 1;
    std::vector<int32_t> sums(depth / 16);
    std::vector<float> rest(call.fine ? depth : 0);
    for (size_t row = call.num_rows * thread / num_threads; row < call.num_rows * (thread + 1) / num_threads; row++) {
        const float* x = call.x + row * call.x_stride;
        quantize_plane(needs, x, depth, planes * row, sums.data());
        if (!call.fine) continue;
        const int8_t* q = q_.data() + planes * row * q_stride_;
        const float* scale = scale_.data() + planes * row * (depth / kGroup);
        for (size_t k = 0; k < depth; k++) rest[k] = x[k] - float(q[k]) * scale[k / kGroup];
        quantize_plane(needs, rest.data(), depth, planes * row + 1, sums.data());
    }
}

void Matmul::quantize_plane(const bool* needs, const float* x, size_t depth, size_t row, int32_t* sums) {
    const size_t groups = depth / kGroup;
    float *scale = scale_.data() + row * groups, *scaled_sum = scaled_sum_.data() + row * groups;
    ops_.quantize_row(x, depth, q_.data() + row * q_stride_, scale, sums);
    for (size_t g = 0; g < groups; g++) scaled_sum[g] = scale[g] * float(sums[2 * g] + sums[2 * g + 1]);
    constexpr int zeros[3] = {8, 16, 128};
    for (int zero = 0; zero < 3; zero++) {
        if (!needs[zero]) continue;
        int32_t* correction = correction_[zero].data() + row * groups;
        for (size_t g = 0; g < groups; g++) correction[g] = -zeros[zero] * (sums[2 * g] + sums[2 * g + 1]);
    }
    if (needs[3])
        for (size_t g = 0; g < 2 * groups; g++) correction_[3][row * 2 * groups + g] = -32 * sums[g];
}

void Matmul::multiply_block(const Call& call, const PackedMatrix& matrix, size_t block, float* y) const {
    const bool quantized = is_quantized(matrix.kind);
    const QuantRows a = quantized ? rows_for(matrix) : QuantRows{};
    const size_t planes = call.fine && quantized ? 2 : 1;
    const size_t limit = quantized ? kMaxTileRows / planes : kMaxPanelRows, num_tiles = (call.num_rows + limit - 1) / limit;
    const size_t columns = std::min(kBlockColumns, matrix.rows - block * kBlockColumns);
    const bool direct = columns == kBlockColumns && planes == 1;   // else the tile goes through `edge`
    const uint8_t* weights = matrix.block(block);
    y += block * kBlockColumns;
    float edge[kMaxPanelRows * kBlockColumns];
    for (size_t tile = 0; tile < num_tiles; tile++) {
        const size_t row = call.num_rows * tile / num_tiles, rows = call.num_rows * (tile + 1) / num_tiles - row;
        float *out = y + row * call.y_stride, *target = direct ? out : edge;
        const size_t stride = direct ? call.y_stride : kBlockColumns;
        if (quantized) {
            ops_.tile[int(matrix.kind)](weights, a, planes * row, int(planes * rows), target, stride, direct && call.add);
        } else {
            ops_.panel[int(matrix.kind)](call.x + row * call.x_stride, call.x_stride, int(rows), weights, matrix.depth,
                                         target, stride, direct && call.add);
        }
        if (direct) continue;
        for (size_t i = 0; i < rows; i++)
            for (size_t n = 0; n < columns; n++) {
                const float* from = edge + planes * i * kBlockColumns + n;
                const float sum = planes == 2 ? from[0] + from[kBlockColumns] : from[0];
                float& value = out[i * call.y_stride + n];
                value = call.add ? value + sum : sum;
            }
    }
}

void Matmul::multiply(const Call& call, size_t queue, int thread, WorkQueue& work) {
    size_t total = 0;
    for (const PackedMatrix* matrix : call.matrices) total += matrix->num_blocks();
    size_t item;
    while (work.take(queue, thread, total, &item)) {
        float* y = call.y;
        for (const PackedMatrix* matrix : call.matrices) {
            if (item < matrix->num_blocks()) {
                multiply_block(call, *matrix, item, y);
                break;
            }
            item -= matrix->num_blocks();
            y += matrix->rows;
        }
    }
}

}  // namespace miniphi
