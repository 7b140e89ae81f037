// Memory for direct I/O: page-aligned, zeroed on demand, returned to the system when released.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashmoe {

constexpr size_t kBlock = 4096;  // offset, length and address of a direct read are multiples of this

// Owns one anonymous mapping.  Move-only; concurrent access to its bytes is the users' business.
class AlignedBuffer {
 public:
  // Throws std::bad_alloc when the system refuses, std::invalid_argument for 0 bytes.
  // huge: ask for 2 MiB pages (a table walk less for each 2 MiB streamed) and align to them.
  AlignedBuffer(size_t nbytes, bool huge);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&&) = delete;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }

 private:
  void* mapping_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  size_t nbytes_ = 0;
};

}  // namespace flashmoe
