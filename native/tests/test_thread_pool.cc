#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#include "check.h"
#include "flashmoe/thread_pool.h"

using flashmoe::ThreadPool;

namespace {

// Every task runs exactly once and its writes are visible when parallel_for returns.
void runs_each_task_once(int threads) {
  ThreadPool pool(threads);
  for (int round = 0; round < 2000; ++round) {
    const int count = round % 37;
    std::vector<int> hits(static_cast<size_t>(count), 0);
    pool.parallel_for(count, [&](int64_t i) { ++hits[static_cast<size_t>(i)]; });
    for (int hit : hits) CHECK(hit == 1);
  }
}

// Workers that have gone to sleep must notice the next job, and a job must not need them.
void wakes_after_a_pause() {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    std::atomic<int64_t> sum{0};
    pool.parallel_for(100, [&](int64_t i) { sum += i; });
    CHECK(sum == 4950);
  }
}

}  // namespace

int main() {
  for (int threads : {1, 2, 4}) runs_each_task_once(threads);
  wakes_after_a_pause();
  return 0;
}
