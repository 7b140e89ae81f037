#include "flashmoe/thread_pool.h"

#include <stdexcept>
#include <string>

namespace flashmoe {
namespace {

constexpr uint64_t kIndexMask = 0xffffffffu;
constexpr uint64_t kClosed = kIndexMask;
// About 100 us of pauses on current machines: longer than the gap between two kernels of a token,
// shorter than a read from the drive.
constexpr int kSpins = 4000;
constexpr int kSpinsBeforeYield = 2000;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : ticket_(kClosed) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads must be between 1 and 1024, got " + std::to_string(threads));
  }
  workers_.reserve(static_cast<size_t>(threads - 1));
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { worker_loop(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_seq_cst);
  wake_.fetch_add(1, std::memory_order_seq_cst);
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t count, Entry entry, void* context) {
  if (count >= static_cast<int64_t>(kClosed))
    throw std::invalid_argument("too many tasks for one parallel_for");
  // Close first, then write the job, then open: a late worker that read the old ticket together with the
  // new job fails its compare-exchange, because it has seen a write that follows the closing one.
  const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store((generation << 32) | kClosed, std::memory_order_seq_cst);
  finished_.store(0, std::memory_order_relaxed);
  entry_.store(entry, std::memory_order_release);
  context_.store(context, std::memory_order_release);
  count_.store(count, std::memory_order_release);
  ticket_.store((generation + 1) << 32, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    wake_.fetch_add(1, std::memory_order_seq_cst);
    wake_.notify_all();
  }
  while (run_one()) {
  }
  for (int spins = 0; finished_.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

bool ThreadPool::run_one() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t index = ticket & kIndexMask;
    if (index == kClosed) return false;
    const int64_t count = count_.load(std::memory_order_acquire);
    const Entry entry = entry_.load(std::memory_order_acquire);
    void* const context = context_.load(std::memory_order_acquire);
    if (static_cast<int64_t>(index) >= count) return false;
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
      entry(context, static_cast<int64_t>(index));
      finished_.fetch_add(1, std::memory_order_release);
      return true;
    }
  }
}

void ThreadPool::worker_loop() {
  int spins = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    if (run_one()) {
      spins = 0;
      continue;
    }
    if (++spins < kSpins) {
      pause_cpu();
      continue;
    }
    const uint32_t seen = wake_.load(std::memory_order_seq_cst);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    // A job opened before the line above is visible here; one opened after it sees the sleeper.
    if (!run_one() && !stop_.load(std::memory_order_seq_cst)) wake_.wait(seen, std::memory_order_seq_cst);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    spins = 0;
  }
}

}  // namespace flashmoe
