#include "io/ring.h"

#if defined(FLASHMOE_HAS_URING)

#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace flashmoe {
namespace {

// The same numbers on every architecture; C libraries before 2.30 lack the names.
constexpr long kSetup = 425, kEnter = 426;
constexpr size_t kMostPerRead = size_t{1} << 30;  // the length of an operation has 32 bits

std::string refusal(const char* call) {
  const int code = errno;
  std::string text = std::string("io_uring is refused here (") + call + ": " + std::strerror(code) + ")";
  if (code == ENOMEM) text += ", raise the limit of locked memory (ulimit -l)";
  return text;
}

template <class T>
T* at(void* base, unsigned offset) {
  return reinterpret_cast<T*>(static_cast<uint8_t*>(base) + offset);
}

}  // namespace

std::string Ring::open(unsigned entries) {
  io_uring_params params = {};
  fd_ = static_cast<int>(syscall(kSetup, entries, &params));
  if (fd_ < 0) return refusal("io_uring_setup");
  if (!(params.features & IORING_FEAT_SINGLE_MMAP) || !(params.features & IORING_FEAT_RW_CUR_POS))
    return "this kernel's io_uring is older than Linux 5.6";
  rings_nbytes_ = std::max(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                           params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
  entries_nbytes_ = params.sq_entries * sizeof(io_uring_sqe);
  const auto map = [this](size_t nbytes, off_t what) {
    void* const p = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, what);
    return p == MAP_FAILED ? nullptr : p;
  };
  rings_ = map(rings_nbytes_, IORING_OFF_SQ_RING);
  if (rings_ == nullptr) return refusal("mmap");
  entries_ = static_cast<io_uring_sqe*>(map(entries_nbytes_, IORING_OFF_SQES));
  if (entries_ == nullptr) return refusal("mmap");
  sq_tail_ = at<unsigned>(rings_, params.sq_off.tail);
  sq_array_ = at<unsigned>(rings_, params.sq_off.array);
  sq_mask_ = *at<unsigned>(rings_, params.sq_off.ring_mask);
  cq_head_ = at<unsigned>(rings_, params.cq_off.head);
  cq_tail_ = at<unsigned>(rings_, params.cq_off.tail);
  cq_mask_ = *at<unsigned>(rings_, params.cq_off.ring_mask);
  completions_ = at<io_uring_cqe>(rings_, params.cq_off.cqes);
  // A filter may let a ring be made and refuse its use: one operation that does nothing shows it.
  nop(0);
  uint64_t id = 0;
  int result = 0;
  while (!next(id, result)) {
    const int code = submit_and_wait();
    if (code == 0 || code == EINTR) continue;
    errno = code;
    return refusal("io_uring_enter");
  }
  return "";
}

Ring::~Ring() {
  if (entries_ != nullptr) munmap(entries_, entries_nbytes_);
  if (rings_ != nullptr) munmap(rings_, rings_nbytes_);
  if (fd_ >= 0) close(fd_);
}

io_uring_sqe& Ring::entry(uint8_t opcode, int fd, uint64_t id) {
  const unsigned tail = *sq_tail_, index = tail & sq_mask_;
  io_uring_sqe& sqe = entries_[index];
  std::memset(&sqe, 0, sizeof(sqe));
  sqe.opcode = opcode;
  sqe.fd = fd;
  sqe.user_data = id;
  sq_array_[index] = index;
  ++unsubmitted_;
  // The kernel looks at the entry only in submit_and_wait(), so it may be filled in after the tail has moved.
  __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
  return sqe;
}

void Ring::read(int fd, uint8_t* out, size_t nbytes, uint64_t offset, uint64_t id) {
  io_uring_sqe& sqe = entry(IORING_OP_READ, fd, id);
  sqe.addr = reinterpret_cast<uintptr_t>(out);
  sqe.len = static_cast<uint32_t>(std::min(nbytes, kMostPerRead));
  sqe.off = offset;
}

void Ring::poll(int fd, uint64_t id) { entry(IORING_OP_POLL_ADD, fd, id).poll_events = POLLIN; }

void Ring::nop(uint64_t id) { entry(IORING_OP_NOP, -1, id); }

int Ring::submit_and_wait() {
  const long taken = syscall(kEnter, fd_, unsubmitted_, 1u, IORING_ENTER_GETEVENTS, nullptr, 0);
  if (taken < 0) return errno;
  unsubmitted_ -= static_cast<unsigned>(taken);
  return 0;
}

bool Ring::next(uint64_t& id, int& result) {
  const unsigned head = *cq_head_;
  if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
  const io_uring_cqe& completion = completions_[head & cq_mask_];
  id = completion.user_data;
  result = completion.res;
  __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
  return true;
}

}  // namespace flashmoe

#endif
