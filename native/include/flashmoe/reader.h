// Asynchronous whole-record reads: a queue of requests, and an engine that serves it.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flashmoe/aligned_buffer.h"

namespace flashmoe {

class FileSet;
class ReadEngine;
class ReadQueue;

enum class DirectMode { automatic, on, off };

// threads: a pool of threads in pread(2).  uring: one thread and an io_uring (Linux 5.6).  automatic: see
// docs/decisions/007-reader.md.
enum class EngineKind { automatic, threads, uring };

struct ReadRequest {
  size_t file = 0;
  uint64_t offset = 0;                    // multiple of kBlock
  size_t nbytes = 0;                      // direct reads: whole blocks, except for a tail that ends the file
  std::shared_ptr<AlignedBuffer> buffer;  // kept alive until the completion has been handed out
  size_t buffer_offset = 0;               // multiple of kBlock
  int64_t tag = 0;
  bool prefetch = false;  // begins only while no demand read waits and at most one read is in flight
};

struct Completion {
  int64_t tag = 0;
  std::string error;  // empty: all bytes are in the buffer
};

struct ReaderStats {
  uint64_t reads = 0;
  uint64_t nbytes = 0;
  double busy_seconds = 0.0;  // at least one read was in flight
  uint64_t max_in_flight = 0;
};

// Thread-safe: any thread may submit and wait.  Every submitted read completes exactly once, failures
// included, unless it was withdrawn.
class Reader {
 public:
  // Opens every file.  Throws std::system_error (message: the path) when one cannot be opened, and, with
  // DirectMode::on, when the file system refuses direct reads; std::runtime_error when EngineKind::uring is
  // asked for and refused.  queue_depth: most reads in flight, 1 to 256.
  Reader(const std::vector<std::string>& paths, DirectMode mode, EngineKind engine, int queue_depth);
  ~Reader();  // finishes the reads in flight, drops the queued ones
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Throws std::invalid_argument when the request does not fit its file, its buffer or the alignment.
  void submit(ReadRequest request);

  // Completions so far, at least one unless nothing is outstanding or `timeout` has passed.
  std::vector<Completion> wait(std::chrono::milliseconds timeout);

  // Takes back the prefetches that have not begun: their tags, and no completion will come for them.
  std::vector<int64_t> withdraw();

  size_t outstanding() const;
  bool direct() const;
  const std::string& direct_reason() const;
  EngineKind engine() const { return kind_; }  // the one that was chosen: threads or uring
  const std::string& engine_reason() const { return engine_reason_; }
  ReaderStats stats() const;

 private:
  void check(const ReadRequest& request) const;
  void choose_engine(EngineKind wanted, int queue_depth);

  // In this order: the engine ends before the queue that it serves and the files that it reads.
  std::unique_ptr<FileSet> files_;
  std::unique_ptr<ReadQueue> queue_;
  std::unique_ptr<ReadEngine> engine_;
  EngineKind kind_ = EngineKind::threads;
  std::string engine_reason_;
};

}  // namespace flashmoe
