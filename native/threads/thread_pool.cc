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

ThreadPool::ThreadPool(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads must be between 1 and 1024, got " + std::to_string(threads));
  }
  tickets_ = std::vector<Ticket>(static_cast<size_t>(threads));
  for (Ticket& ticket : tickets_) ticket.value.store(kClosed, std::memory_order_relaxed);
  workers_.reserve(static_cast<size_t>(threads - 1));
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { worker_loop(i); });
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
  // Close first, then write the job, then open: a late worker that read an old ticket together with the
  // new job fails its compare-exchange, because it has seen a write that follows the closing one.
  const uint64_t generation = (tickets_[0].value.load(std::memory_order_relaxed) >> 32) + 1;
  for (Ticket& ticket : tickets_) {
    ticket.value.store((generation << 32) | kClosed, std::memory_order_relaxed);
  }
  finished_.store(0, std::memory_order_relaxed);
  job_.entry.store(entry, std::memory_order_release);
  job_.context.store(context, std::memory_order_release);
  job_.count.store(count, std::memory_order_release);
  for (Ticket& ticket : tickets_) ticket.value.store((generation + 1) << 32, std::memory_order_release);
  const int64_t mine = run_tasks(0);
  const int64_t others = count - mine;
  for (int spins = 0; finished_.load(std::memory_order_acquire) < others; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

// Wakes who sleeps; whether anybody did.  Without a fence it may miss one who is just falling asleep: the
// caller looks again after each task, and a task never needs a worker.
bool ThreadPool::wake_sleepers() {
  if (sleepers_.load(std::memory_order_relaxed) == 0) return false;
  wake_.fetch_add(1, std::memory_order_seq_cst);
  wake_.notify_all();
  return true;
}

// A thread's own tasks and then the others'; how many it has run.
int64_t ThreadPool::run_tasks(int64_t thread) {
  const int64_t threads = static_cast<int64_t>(tickets_.size());
  bool woken = thread != 0 || wake_sleepers();
  int64_t done = 0;
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t owner = (thread + i) % threads;
    while (run_next(owner)) {
      ++done;
      woken = woken || wake_sleepers();
    }
  }
  return done;
}

// Claims and runs the next task of a thread; false when there is none.
bool ThreadPool::run_next(int64_t owner) {
  std::atomic<uint64_t>& value = tickets_[static_cast<size_t>(owner)].value;
  uint64_t ticket = value.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t claimed = ticket & kIndexMask;
    if (claimed == kClosed) return false;
    const int64_t count = job_.count.load(std::memory_order_acquire);
    const Entry entry = job_.entry.load(std::memory_order_acquire);
    void* const context = job_.context.load(std::memory_order_acquire);
    const int64_t task = static_cast<int64_t>(claimed * tickets_.size()) + owner;
    if (task >= count) return false;
    if (value.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                    std::memory_order_acquire)) {
      entry(context, task);
      return true;
    }
  }
}

void ThreadPool::worker_loop(int64_t thread) {
  const std::atomic<uint64_t>& own = tickets_[static_cast<size_t>(thread)].value;
  uint64_t seen_job = kClosed;  // generation in the high half: nothing is left of it
  int spins = 0;
  const auto work = [&] {
    const uint64_t generation = own.load(std::memory_order_acquire) & ~kIndexMask;
    if (generation == seen_job) return false;  // its own line only: the others' belong to those at work
    const int64_t done = run_tasks(thread);
    if (done > 0) finished_.fetch_add(done, std::memory_order_release);
    if (done > 0 || (own.load(std::memory_order_relaxed) & kIndexMask) != kClosed) seen_job = generation;
    return done > 0;
  };
  while (!stop_.load(std::memory_order_relaxed)) {
    if (work()) {
      spins = 0;
      continue;
    }
    if (++spins < kSpins) {
      pause_cpu();
      continue;
    }
    const uint32_t seen = wake_.load(std::memory_order_seq_cst);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    if (!work() && !stop_.load(std::memory_order_seq_cst)) wake_.wait(seen, std::memory_order_seq_cst);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    spins = 0;
  }
}

}  // namespace flashmoe
