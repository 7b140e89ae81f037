// An io_uring by raw system calls: liburing would be a dependency for three calls.
#pragma once

// The headers may be older than the kernel, or of another system.  READ came with the feature named here
// (5.6).
#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#if defined(IORING_FEAT_RW_CUR_POS)
#define FLASHMOE_HAS_URING 1

#include <cstddef>
#include <cstdint>
#include <string>

namespace flashmoe {

// Not thread-safe: belongs to one thread at a time.
class Ring {
 public:
  Ring() = default;
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Room for `entries` operations; "" or why it is refused.
  std::string open(unsigned entries);

  // Queue an operation for the next submit(); at most `entries` may be outstanding.
  void read(int fd, uint8_t* out, size_t nbytes, uint64_t offset, uint64_t id);
  void poll(int fd, uint64_t id);  // completes once when fd is readable
  void nop(uint64_t id);

  // Hands the queued operations to the kernel and blocks until one has completed.  0 or errno; what the
  // kernel did not take stays queued.
  int submit_and_wait();

  // The next completion: its id and the operation's result (bytes, or a negative errno).  False when none is
  // left.
  bool next(uint64_t& id, int& result);

 private:
  io_uring_sqe& entry(uint8_t opcode, int fd, uint64_t id);

  int fd_ = -1;
  void* rings_ = nullptr;  // both rings' indices, and the completions
  size_t rings_nbytes_ = 0;
  io_uring_sqe* entries_ = nullptr;
  size_t entries_nbytes_ = 0;
  unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0;
  unsigned unsubmitted_ = 0;
  io_uring_cqe* completions_ = nullptr;
};

}  // namespace flashmoe

#endif
#endif
