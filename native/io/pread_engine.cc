// A pool of threads in pread(2): as many reads in flight as there are threads.
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <thread>
#include <vector>

#include "io/read_engine.h"

namespace flashmoe {
namespace {

class PreadEngine final : public ReadEngine {
 public:
  PreadEngine(const FileSet& files, ReadQueue& queue, int threads) : files_(files), queue_(queue) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { io_loop(); });
  }
  ~PreadEngine() override {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void io_loop() {
    while (std::optional<ReadRequest> request = queue_.pop()) {
      std::string error = read_all(*request);
      files_.drop_cached(*request);
      queue_.finish(*request, std::move(error));
    }
  }

  std::string read_all(const ReadRequest& request) const {
    const OpenFile& file = files_[request.file];
    uint8_t* out = request.buffer->data() + request.buffer_offset;
    const size_t whole = files_.in_place_nbytes(request);
    std::string error = read_in_place(file, out, whole, request.offset);
    if (error.empty() && whole < request.nbytes)
      error = read_tail(file, request.offset + whole, out + whole, request.nbytes - whole);
    return error;
  }

  // "" or what went wrong; retries interrupted and partial reads.
  static std::string read_in_place(const OpenFile& file, uint8_t* out, size_t nbytes, uint64_t offset) {
    size_t done = 0;
    while (done < nbytes) {
      const ssize_t got = pread(file.fd, out + done, nbytes - done, static_cast<off_t>(offset + done));
      if (got > 0) {
        done += static_cast<size_t>(got);
        continue;
      }
      if (got < 0 && errno == EINTR) continue;
      return got < 0 ? read_failure(file, offset, errno) : short_read(file, offset, done, nbytes);
    }
    return "";
  }

  static std::string read_tail(const OpenFile& file, uint64_t offset, uint8_t* out, size_t nbytes) {
    alignas(kBlock) uint8_t block[kBlock];
    ssize_t got = -1;
    do {
      got = pread(file.fd, block, kBlock, static_cast<off_t>(offset));
    } while (got < 0 && errno == EINTR);
    if (got < static_cast<ssize_t>(nbytes)) return tail_failure(file, offset, got < 0 ? errno : 0);
    std::memcpy(out, block, nbytes);
    return "";
  }

  const FileSet& files_;
  ReadQueue& queue_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<ReadEngine> make_pread_engine(const FileSet& files, ReadQueue& queue, int queue_depth) {
  return std::make_unique<PreadEngine>(files, queue, queue_depth);
}

}  // namespace flashmoe
