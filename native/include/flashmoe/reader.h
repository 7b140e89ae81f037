// Asynchronous whole-record reads by a pool of I/O threads.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "flashmoe/aligned_buffer.h"

namespace flashmoe {

enum class DirectMode { automatic, on, off };

struct ReadRequest {
  size_t file = 0;
  uint64_t offset = 0;                    // multiple of kBlock
  size_t nbytes = 0;                      // direct reads: whole blocks, except for a tail that ends the file
  std::shared_ptr<AlignedBuffer> buffer;  // kept alive until the completion has been handed out
  size_t buffer_offset = 0;               // multiple of kBlock
  int64_t tag = 0;
  bool prefetch = false;  // served only while no demand read waits
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
// included.
class Reader {
 public:
  // Opens every file.  Throws std::system_error (message: the path) when one cannot be opened, and, with
  // DirectMode::on, when the file system refuses direct reads.
  Reader(std::vector<std::string> paths, DirectMode mode, int queue_depth);
  ~Reader();  // finishes the reads in flight, drops the queued ones
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Throws std::invalid_argument when the request does not fit its file, its buffer or the alignment.
  void submit(ReadRequest request);

  // Completions so far, at least one unless nothing is outstanding or `timeout` has passed.
  std::vector<Completion> wait(std::chrono::milliseconds timeout);

  size_t outstanding() const;
  bool direct() const { return direct_; }
  const std::string& direct_reason() const { return direct_reason_; }
  ReaderStats stats() const;

 private:
  struct File {
    std::string path;
    int fd = -1;
    uint64_t nbytes = 0;
  };

  bool enable_direct(DirectMode mode);
  void close_files();
  void io_loop();
  std::string read_all(const ReadRequest& request) const;
  std::string read_tail(const File& file, uint64_t offset, uint8_t* out, size_t nbytes) const;

  std::vector<File> files_;
  bool direct_ = false;
  std::string direct_reason_;

  mutable std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<ReadRequest> demand_, prefetch_;
  std::vector<Completion> completed_;
  size_t outstanding_ = 0;  // submitted and not yet handed out
  size_t in_flight_ = 0;
  std::chrono::steady_clock::time_point busy_since_;
  ReaderStats stats_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace flashmoe
