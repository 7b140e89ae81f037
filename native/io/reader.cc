#include "flashmoe/reader.h"

#include <stdexcept>
#include <utility>

#include "io/read_engine.h"

namespace flashmoe {

Reader::Reader(const std::vector<std::string>& paths, DirectMode mode, EngineKind engine, int queue_depth) {
  if (queue_depth < 1 || queue_depth > 256) throw std::invalid_argument("queue depth must be 1 to 256");
  files_ = std::make_unique<FileSet>(paths, mode);
  queue_ = std::make_unique<ReadQueue>();
  choose_engine(engine, queue_depth);
}

Reader::~Reader() { queue_->stop(); }

void Reader::choose_engine(EngineKind wanted, int queue_depth) {
  if (wanted == EngineKind::uring) {
    std::string refusal;
    engine_ = make_uring_engine(*files_, *queue_, queue_depth, refusal);
    if (engine_ == nullptr) throw std::runtime_error(refusal);
    kind_ = EngineKind::uring;
    engine_reason_ = "io_uring was asked for";
    return;
  }
  engine_reason_ = wanted == EngineKind::threads
                       ? "threads were asked for"
                       : "beside computing, a pool of threads is faster than io_uring";
  engine_ = make_pread_engine(*files_, *queue_, queue_depth);
}

void Reader::submit(ReadRequest request) {
  check(request);
  queue_->push(std::move(request));
  engine_->wake();
}

void Reader::check(const ReadRequest& request) const {
  if (request.file >= files_->size()) throw std::invalid_argument("file index out of range");
  const OpenFile& file = (*files_)[request.file];
  if (request.nbytes == 0 || request.nbytes > file.nbytes || request.offset > file.nbytes - request.nbytes) {
    throw std::invalid_argument("a read beyond the end of " + file.path);
  }
  const AlignedBuffer& buffer = *request.buffer;
  if (request.nbytes > buffer.nbytes() || request.buffer_offset > buffer.nbytes() - request.nbytes) {
    throw std::invalid_argument("a read beyond the end of its buffer");
  }
  if (request.offset % kBlock != 0 || request.buffer_offset % kBlock != 0) {
    throw std::invalid_argument("file and buffer offsets must be multiples of 4096");
  }
}

std::vector<Completion> Reader::wait(std::chrono::milliseconds timeout) { return queue_->wait(timeout); }
std::vector<int64_t> Reader::withdraw() { return queue_->withdraw(); }
size_t Reader::outstanding() const { return queue_->outstanding(); }
bool Reader::direct() const { return files_->direct(); }
const std::string& Reader::direct_reason() const { return files_->direct_reason(); }
ReaderStats Reader::stats() const { return queue_->stats(); }

}  // namespace flashmoe
