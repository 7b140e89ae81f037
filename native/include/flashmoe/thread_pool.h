// A fork-join pool for kernels that last microseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace flashmoe {

// Runs numbered tasks on a fixed set of threads, the caller among them.
//
// Of T threads the t-th takes tasks t, t + T, t + 2T ... in their order, each claimed in a cache line that
// nobody else touches, and then what is left of the others'.  One counter for all took a transfer between
// cores for every task and another when it ended: 30 ns in one group of cores, 300 between two.
//
// Workers spin for a moment after each job, because the next one of a token follows within microseconds,
// and then sleep.  A worker that is not scheduled in time is simply not waited for: the caller waits for
// tasks, never for threads.  Tasks must be independent of one another and of which thread runs them.
//
// parallel_for may be called from one thread at a time; tasks must not throw and must not call it.
class ThreadPool {
 public:
  // Throws std::invalid_argument unless 1 <= threads <= 1024.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(i) once for every i in [0, count) and returns when all have finished.
  template <class Task>
  void parallel_for(int64_t count, Task&& task) {
    if (workers_.empty() || count <= 1) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    using Plain = std::remove_reference_t<Task>;
    run(
        count, [](void* context, int64_t i) { (*static_cast<Plain*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&task)));
  }

 private:
  using Entry = void (*)(void* context, int64_t task);
  // High half: generation of the job.  Low half: how many of a thread's tasks are claimed, or kClosed while
  // no job is open.
  struct alignas(64) Ticket {
    std::atomic<uint64_t> value;
  };
  struct alignas(64) Job {
    std::atomic<Entry> entry{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<int64_t> count{0};
  };

  void run(int64_t count, Entry entry, void* context);
  int64_t run_tasks(int64_t thread);
  bool run_next(int64_t owner);
  bool wake_sleepers();
  void worker_loop(int64_t thread);

  std::vector<Ticket> tickets_;
  Job job_;
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> wake_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace flashmoe
