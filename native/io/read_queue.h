// Requests that wait, completions that wait, and their counters: what engines have in common.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "flashmoe/reader.h"

namespace flashmoe {

// Thread-safe.  A request that was popped counts as in flight until it is finished.
class ReadQueue {
 public:
  void push(ReadRequest request);

  // The next request, demand before prefetch, each in order; see ReadRequest::prefetch for when a prefetch
  // may begin.  Blocks for one; none after stop().
  std::optional<ReadRequest> pop();
  // The same without blocking.
  std::optional<ReadRequest> try_pop();
  // Hands its outcome (error: empty when all went well) to whoever waits and lets go of its buffer.
  void finish(ReadRequest& request, std::string error);

  std::vector<Completion> wait(std::chrono::milliseconds timeout);  // see Reader::wait
  std::vector<int64_t> withdraw();                                  // see Reader::withdraw
  size_t outstanding() const;
  ReaderStats stats() const;
  void stop();  // nothing is popped any more
  bool stopped() const;

 private:
  // Both under the lock.
  bool ready() const;
  std::optional<ReadRequest> take();

  mutable std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<ReadRequest> demand_, prefetch_;
  std::vector<Completion> completed_;
  size_t outstanding_ = 0;  // submitted and not yet handed out
  size_t in_flight_ = 0;
  std::chrono::steady_clock::time_point busy_since_;
  ReaderStats stats_;
  bool stop_ = false;
};

}  // namespace flashmoe
