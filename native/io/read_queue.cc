#include "io/read_queue.h"

#include <utility>

namespace flashmoe {
namespace {
// Reads that may be in flight when a prefetch begins.  With two the drive is busy, and a demand read that
// comes next shares it with two records at most.
constexpr size_t kPrefetchBeside = 1;
}  // namespace

void ReadQueue::push(ReadRequest request) {
  bool wanted = true;
  {
    const std::lock_guard lock(mutex_);
    (request.prefetch ? prefetch_ : demand_).push_back(std::move(request));
    ++outstanding_;
    wanted = ready();
  }
  // A prefetch that has to wait is found by whoever finishes a read: a thread that is woken in vain takes a
  // processor from one that computes.
  if (wanted) work_.notify_one();
}

std::optional<ReadRequest> ReadQueue::pop() {
  std::unique_lock lock(mutex_);
  work_.wait(lock, [this] { return stop_ || ready(); });
  std::optional<ReadRequest> request = take();
  // After a finished read two prefetches may begin, and only this thread looks.
  if (request && demand_.empty() && ready()) work_.notify_one();
  return request;
}

std::optional<ReadRequest> ReadQueue::try_pop() {
  const std::lock_guard lock(mutex_);
  return take();
}

bool ReadQueue::ready() const {
  return !demand_.empty() || (!prefetch_.empty() && in_flight_ <= kPrefetchBeside);
}

std::optional<ReadRequest> ReadQueue::take() {
  if (stop_ || !ready()) return std::nullopt;
  std::deque<ReadRequest>& queue = demand_.empty() ? prefetch_ : demand_;
  std::optional<ReadRequest> request = std::move(queue.front());
  queue.pop_front();
  if (in_flight_++ == 0) busy_since_ = std::chrono::steady_clock::now();
  if (in_flight_ > stats_.max_in_flight) stats_.max_in_flight = in_flight_;
  return request;
}

void ReadQueue::finish(ReadRequest& request, std::string error) {
  request.buffer.reset();
  const std::lock_guard lock(mutex_);
  ++stats_.reads;
  if (error.empty()) stats_.nbytes += request.nbytes;
  if (--in_flight_ == 0) {
    stats_.busy_seconds +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - busy_since_).count();
  }
  completed_.push_back({request.tag, std::move(error)});
  done_.notify_one();
}

std::vector<Completion> ReadQueue::wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  done_.wait_for(lock, timeout, [this] { return !completed_.empty() || outstanding_ == 0; });
  std::vector<Completion> out;
  out.swap(completed_);
  outstanding_ -= out.size();
  return out;
}

std::vector<int64_t> ReadQueue::withdraw() {
  const std::lock_guard lock(mutex_);
  std::vector<int64_t> tags;
  for (const ReadRequest& request : prefetch_) tags.push_back(request.tag);
  prefetch_.clear();
  outstanding_ -= tags.size();
  if (outstanding_ == 0) done_.notify_all();
  return tags;
}

size_t ReadQueue::outstanding() const {
  const std::lock_guard lock(mutex_);
  return outstanding_;
}

ReaderStats ReadQueue::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void ReadQueue::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
}

bool ReadQueue::stopped() const {
  const std::lock_guard lock(mutex_);
  return stop_;
}

}  // namespace flashmoe
