// How products are cut into tasks.  A row's result never depends on the cut: a task owns whole rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flashmoe {

inline int64_t tasks_of(int64_t items, int64_t per_task) { return (items + per_task - 1) / per_task; }

// Which of `count` items task `task` is, so that a thread, which takes every T-th task, gets neighbours.
inline int64_t neighbour(int64_t task, int64_t count, int64_t threads) {
  const int64_t thread = task % threads;
  return thread * (count / threads) + std::min(thread, count % threads) + task / threads;
}

// Equal items in a row, row tiles of one matrix: how many and what one costs (bytes, or what takes as long).
struct WorkRun {
  int64_t items = 0;
  int64_t cost = 1;
};

// Cuts runs into tasks by factoring (Hummel, Schonberg and Flynn 1992): each thread begins with a long
// stretch of memory, and ever shorter ones level out the end.  Equal tasks of 32 KiB read at half of the
// bandwidth, because each began with cache misses that nothing had prefetched.
class WorkSplit {
 public:
  // share: of what is left, that the threads together take next.
  void cut(std::span<const WorkRun> runs, int threads, int64_t least, double share = 0.5) {
    pieces_.clear();
    starts_.clear();
    int64_t left = 0;
    for (const WorkRun& run : runs) left += run.items * run.cost;
    Position at;
    while (left > 0) {
      const int64_t target =
          std::max(least, static_cast<int64_t>(share * static_cast<double>(left)) / threads);
      for (int i = 0; i < threads && left > 0; ++i) left -= add_task(runs, target, at);
    }
    starts_.push_back(pieces_.size());
  }

  int64_t tasks() const { return static_cast<int64_t>(starts_.size()) - 1; }

  // Calls body(run, begin, end) for each piece of a task.
  template <class Body>
  void for_each_piece(int64_t task, Body&& body) const {
    const size_t i = static_cast<size_t>(task);
    for (size_t p = starts_[i]; p < starts_[i + 1]; ++p) {
      body(pieces_[p].run, pieces_[p].begin, pieces_[p].end);
    }
  }

 private:
  struct Piece {
    size_t run;
    int64_t begin, end;
  };
  struct Position {
    size_t run = 0;
    int64_t item = 0;
  };

  // Returns the cost of what it took.
  int64_t add_task(std::span<const WorkRun> runs, int64_t target, Position& at) {
    starts_.push_back(pieces_.size());
    int64_t taken = 0;
    while (taken < target && at.run < runs.size()) {
      const WorkRun& run = runs[at.run];
      const int64_t wanted = tasks_of(target - taken, run.cost);
      // Two tiles share their activations: never an odd number but at the end.
      const int64_t items = std::min(run.items - at.item, tasks_of(wanted, 2) * 2);
      if (items > 0) pieces_.push_back({at.run, at.item, at.item + items});
      taken += items * run.cost;
      at.item += items;
      if (at.item == run.items) at = {at.run + 1, 0};
    }
    return taken;
  }

  std::vector<Piece> pieces_;
  std::vector<size_t> starts_;
};

}  // namespace flashmoe
