// A fixed team of threads that runs one function together, with a light barrier inside.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace miniphi {

// Sense-reversing barrier. Waiting spins briefly, then yields: on a shared core the other thread must get to run.
class Barrier {
public:
    explicit Barrier(int num_threads) : num_threads_(num_threads) {}
    void wait();

private:
    const int num_threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};

class ThreadPool {
public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return num_threads_; }
    // Call body(thread) on every thread, thread 0 being the caller; returns when all are done. body must not throw.
    void run(const std::function<void(int)>& body);
    Barrier& barrier() { return barrier_; }

private:
    void work(int thread);

    const int num_threads_;
    Barrier barrier_;
    const std::function<void(int)>* body_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int> running_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> threads_;
};

// One counter per thread over its own range of work items. A thread takes from its range, then from the others':
// a neighbour that steals processor time delays its own share only by one item.
class WorkQueue {
public:
    WorkQueue(size_t num_queues, int num_threads);
    void reset();
    // The next item for `thread` of queue `queue`, items [0, count) cut in num_threads even ranges; false when empty.
    bool take(size_t queue, int thread, size_t count, size_t* item);
    // The same for many small items: the first half of what is left of the thread's own range, or one item of another's.
    // Taking is a fence, which waits for every line that is on its way and starts the next one only then.
    bool take_run(size_t queue, int thread, size_t count, size_t* first, size_t* last);

private:
    bool take_some(size_t queue, int thread, size_t count, bool many, size_t* first, size_t* last);

    struct alignas(64) Counter {
        std::atomic<size_t> taken{0};
    };
    const size_t num_queues_;
    const int num_threads_;
    std::unique_ptr<Counter[]> counters_;
};

}  // namespace miniphi
