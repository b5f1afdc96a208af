#include "thread_pool.h"

#include <algorithm>

namespace miniphi {
namespace {

constexpr int kSpinsBeforeYield = 2000;    // a few microseconds: longer than any balanced operation's skew
constexpr int kSpinsBeforeSleep = 20000;   // tens of microseconds: the gap between two steps of a decode loop

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

void Barrier::wait() {
    if (num_threads_ == 1) return;
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; spins++) {
        if (spins < kSpinsBeforeYield) relax();
        else std::this_thread::yield();
    }
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), barrier_(num_threads) {
    for (int thread = 1; thread < num_threads; thread++) threads_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::work(int thread) {
    uint32_t seen = 0;
    while (true) {
        for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; spins++) {
            if (spins < kSpinsBeforeSleep) relax();
            else epoch_.wait(seen, std::memory_order_acquire);
        }
        seen++;
        if (stop_.load()) return;
        (*body_)(thread);
        running_.fetch_sub(1, std::memory_order_acq_rel);
    }
}

void ThreadPool::run(const std::function<void(int)>& body) {
    body_ = &body;
    running_.store(num_threads_ - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    body(0);
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0; spins++) {
        if (spins < kSpinsBeforeYield) relax();
        else std::this_thread::yield();
    }
}

WorkQueue::WorkQueue(size_t num_queues, int num_threads)
    : num_queues_(num_queues), num_threads_(num_threads), counters_(new Counter[num_queues * num_threads]) {}

void WorkQueue::reset() {
    for (size_t i = 0; i < num_queues_ * num_threads_; i++) counters_[i].taken.store(0, std::memory_order_relaxed);
}

bool WorkQueue::take(size_t queue, int thread, size_t count, size_t* item) {
    size_t last;
    return take_some(queue, thread, count, false, item, &last);
}

bool WorkQueue::take_run(size_t queue, int thread, size_t count, size_t* first, size_t* last) {
    return take_some(queue, thread, count, true, first, last);
}

bool WorkQueue::take_some(size_t queue, int thread, size_t count, bool many, size_t* first, size_t* last) {
    for (int step = 0; step < num_threads_; step++) {
        const int owner = (thread + step) % num_threads_;
        const size_t start = count * owner / num_threads_, size = count * (owner + 1) / num_threads_ - start;
        std::atomic<size_t>& counter = counters_[queue * num_threads_ + owner].taken;
        const size_t seen = counter.load(std::memory_order_relaxed);
        if (seen >= size) continue;
        const size_t wanted = many && step == 0 ? (size - seen + 1) / 2 : 1;
        const size_t taken = counter.fetch_add(wanted, std::memory_order_relaxed);
        if (taken >= size) continue;
        *first = start + taken;
        *last = start + std::min(taken + wanted, size);
        return true;
    }
    return false;
}

}  // namespace miniphi
