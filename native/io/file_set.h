// The open files of a reader, and what their reads have in common.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flashmoe/reader.h"

namespace flashmoe {

struct OpenFile {
  std::string path;
  int fd = -1;
  uint64_t nbytes = 0;  // when it was opened
};

// Immutable once constructed, hence thread-safe.
class FileSet {
 public:
  // Throws std::system_error, see Reader.
  FileSet(const std::vector<std::string>& paths, DirectMode mode);
  ~FileSet();
  FileSet(const FileSet&) = delete;
  FileSet& operator=(const FileSet&) = delete;

  size_t size() const { return files_.size(); }
  const OpenFile& operator[](size_t i) const { return files_[i]; }
  bool direct() const { return direct_; }
  const std::string& direct_reason() const { return direct_reason_; }

  // Bytes of the request that are read in place; the rest, a partial last block, goes through a block apart
  // because the kernel may write all of it.
  size_t in_place_nbytes(const ReadRequest& request) const {
    return direct_ ? request.nbytes / kBlock * kBlock : request.nbytes;
  }

  // Buffered reads must not fill the page cache: it counts against the memory budget.
  void drop_cached(const ReadRequest& request) const;

 private:
  bool enable_direct(DirectMode mode);
  void close_all();

  std::vector<OpenFile> files_;
  bool direct_ = false;
  std::string direct_reason_;
};

// The texts of failed reads, the same from every engine.
std::string read_failure(const OpenFile& file, uint64_t offset, int code);
std::string short_read(const OpenFile& file, uint64_t offset, size_t done, size_t nbytes);
std::string tail_failure(const OpenFile& file, uint64_t offset, int code);  // code 0: the file ends early

}  // namespace flashmoe
