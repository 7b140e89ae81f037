#include "flashmoe/aligned_buffer.h"

#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <utility>

namespace flashmoe {
namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}

AlignedBuffer::AlignedBuffer(size_t nbytes, bool huge) : nbytes_(nbytes) {
  if (nbytes == 0) throw std::invalid_argument("a buffer needs at least one byte");
  const bool use_huge = huge && nbytes >= 2 * kHugePage;
  const size_t align = use_huge ? kHugePage : kBlock;
  mapped_ = (nbytes + kBlock - 1) / kBlock * kBlock + (use_huge ? align : 0);
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t start = reinterpret_cast<uintptr_t>(mapping_);
  data_ = reinterpret_cast<uint8_t*>((start + align - 1) / align * align);
#if defined(MADV_HUGEPAGE)
  // Only whole huge pages inside the wanted range: a partial one at the end would be charged in full.
  if (use_huge) madvise(data_, nbytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)),
      mapped_(other.mapped_),
      data_(other.data_),
      nbytes_(other.nbytes_) {}

AlignedBuffer::~AlignedBuffer() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

}  // namespace flashmoe
