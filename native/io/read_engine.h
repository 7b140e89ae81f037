// What serves a queue of reads.
#pragma once

#include <memory>
#include <string>

#include "io/file_set.h"
#include "io/read_queue.h"

namespace flashmoe {

class ReadEngine {
 public:
  // The queue has been stopped before: finishes what is in flight and ends the engine's threads.
  virtual ~ReadEngine() = default;
  // Something was pushed.  Thread-safe.
  virtual void wake() {}
};

// Both keep references to `files` and `queue`; at most queue_depth reads are in flight.
std::unique_ptr<ReadEngine> make_pread_engine(const FileSet& files, ReadQueue& queue, int queue_depth);
// Null, with the reason, where io_uring is missing or refused.
std::unique_ptr<ReadEngine> make_uring_engine(const FileSet& files, ReadQueue& queue, int queue_depth,
                                              std::string& reason);

}  // namespace flashmoe
