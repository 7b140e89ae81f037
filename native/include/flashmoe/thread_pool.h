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

  void run(int64_t count, Entry entry, void* context);
  bool run_one();
  void worker_loop();

  // High half: generation of the job.  Low half: next unclaimed task, or kClosed while no job is open.
  std::atomic<uint64_t> ticket_;
  std::atomic<Entry> entry_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> count_{0};
  std::atomic<int64_t> finished_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> wake_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace flashmoe
