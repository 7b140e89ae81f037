// One thread that hands reads to an io_uring and takes back what has completed.
#include "io/read_engine.h"
#include "io/ring.h"

#if defined(FLASHMOE_HAS_URING)

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace flashmoe {
namespace {

constexpr uint64_t kWake = ~uint64_t{0};

class UringEngine final : public ReadEngine {
 public:
  UringEngine(const FileSet& files, ReadQueue& queue, int queue_depth)
      : files_(files), queue_(queue), slots_(static_cast<size_t>(queue_depth)) {}

  // "" or why not.  Called once, before anything else.
  std::string start() {
    event_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (event_ < 0) return std::string("io_uring has no eventfd to wait for: ") + std::strerror(errno);
    std::string refusal = ring_.open(static_cast<unsigned>(slots_.size()) + 1);
    if (!refusal.empty()) return refusal;
    for (size_t i = slots_.size(); i-- > 0;) free_.push_back(i);
    thread_ = std::thread([this] { io_loop(); });
    return "";
  }

  ~UringEngine() override {
    if (thread_.joinable()) {
      wake();
      thread_.join();
    }
    if (event_ >= 0) close(event_);
  }

  void wake() override {
    const uint64_t one = 1;
    // Fails only when the counter is full, and then the thread is awake.
    [[maybe_unused]] const ssize_t written = write(event_, &one, sizeof(one));
  }

 private:
  struct Slot {
    std::optional<ReadRequest> request;    // none: free
    size_t done = 0;                       // bytes read so far
    std::unique_ptr<AlignedBuffer> block;  // of a partial last block, see FileSet::in_place_nbytes
  };

  void io_loop() {
    ring_.poll(event_, kWake);
    for (;;) {
      while (!free_.empty()) {
        std::optional<ReadRequest> request = queue_.try_pop();
        if (!request) break;
        begin(std::move(*request));
      }
      if (free_.size() == slots_.size() && queue_.stopped()) return;
      const int code = ring_.submit_and_wait();
      // EAGAIN, EBUSY: the kernel is short of memory or of room for completions; what has completed makes
      // some.
      if (code != 0 && code != EINTR && code != EAGAIN && code != EBUSY) return fail_all(code);
      uint64_t id = 0;
      int result = 0;
      while (ring_.next(id, result)) {
        if (id == kWake) {
          rearm();
        } else {
          advance(id, result);
        }
      }
    }
  }

  void rearm() {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = read(event_, &count, sizeof(count));  // makes it unreadable again
    ring_.poll(event_, kWake);
  }

  void begin(ReadRequest request) {
    const size_t i = free_.back();
    free_.pop_back();
    slots_[i].request = std::move(request);
    slots_[i].done = 0;
    read_on(i);
  }

  // Asks for what is still missing: the rest in place, then the partial last block.
  void read_on(size_t i) {
    Slot& slot = slots_[i];
    const ReadRequest& request = *slot.request;
    const size_t whole = files_.in_place_nbytes(request);
    const int fd = files_[request.file].fd;
    if (slot.done < whole) {
      uint8_t* out = request.buffer->data() + request.buffer_offset + slot.done;
      ring_.read(fd, out, whole - slot.done, request.offset + slot.done, i);
      return;
    }
    if (slot.block == nullptr) slot.block = std::make_unique<AlignedBuffer>(kBlock, false);
    ring_.read(fd, slot.block->data(), kBlock, request.offset + whole, i);
  }

  // Takes the result of the operation that read_on() queued.
  void advance(size_t i, int result) {
    if (result == -EINTR || result == -EAGAIN) return read_on(i);
    Slot& slot = slots_[i];
    const ReadRequest& request = *slot.request;
    const OpenFile& file = files_[request.file];
    const size_t whole = files_.in_place_nbytes(request);
    if (slot.done >= whole) return finish_tail(i, result);
    if (result < 0) return finish(i, read_failure(file, request.offset, -result));
    if (result == 0) return finish(i, short_read(file, request.offset, slot.done, whole));
    slot.done += static_cast<size_t>(result);
    if (slot.done < request.nbytes) return read_on(i);
    finish(i, "");
  }

  void finish_tail(size_t i, int result) {
    const Slot& slot = slots_[i];
    const ReadRequest& request = *slot.request;
    const size_t left = request.nbytes - slot.done;
    if (result < 0 || static_cast<size_t>(result) < left) {
      const int code = result < 0 ? -result : 0;
      return finish(i, tail_failure(files_[request.file], request.offset + slot.done, code));
    }
    std::memcpy(request.buffer->data() + request.buffer_offset + slot.done, slot.block->data(), left);
    finish(i, "");
  }

  void finish(size_t i, std::string error) {
    ReadRequest& request = *slots_[i].request;
    files_.drop_cached(request);
    queue_.finish(request, std::move(error));
    slots_[i].request.reset();
    free_.push_back(i);
  }

  // The ring is broken, which no sound kernel does: every read fails from now on.  Buffers of reads that the
  // kernel may still be busy with are kept until the ring has been closed.
  void fail_all(int code) {
    const std::string text = std::string("io_uring_enter: ") + std::strerror(code);
    for (Slot& slot : slots_) {
      if (!slot.request) continue;
      abandoned_.push_back(slot.request->buffer);
      queue_.finish(*slot.request, text);
    }
    while (std::optional<ReadRequest> request = queue_.pop()) queue_.finish(*request, text);
  }

  const FileSet& files_;
  ReadQueue& queue_;
  int event_ = -1;
  std::vector<std::shared_ptr<AlignedBuffer>> abandoned_;  // before the ring: outlives it
  std::vector<Slot> slots_;
  std::vector<size_t> free_;
  Ring ring_;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<ReadEngine> make_uring_engine(const FileSet& files, ReadQueue& queue, int queue_depth,
                                              std::string& reason) {
  auto engine = std::make_unique<UringEngine>(files, queue, queue_depth);
  reason = engine->start();
  if (!reason.empty()) return nullptr;
  return engine;
}

}  // namespace flashmoe

#else

namespace flashmoe {

std::unique_ptr<ReadEngine> make_uring_engine(const FileSet&, ReadQueue&, int, std::string& reason) {
  reason = "this build has no io_uring: it needs Linux 5.6 or newer";
  return nullptr;
}

}  // namespace flashmoe

#endif
