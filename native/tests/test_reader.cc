#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "check.h"
#include "flashmoe/reader.h"

using namespace flashmoe;

namespace {

constexpr size_t kRecord = 2 * kBlock;
constexpr size_t kRecords = 33;
constexpr size_t kTail = 100;  // the file does not end on a block

uint8_t byte_at(size_t i) { return static_cast<uint8_t>((i * 2654435761u) >> 13); }

std::string make_file() {
  char path[] = "reader-test-XXXXXX";
  const int fd = mkstemp(path);
  CHECK(fd >= 0);
  std::vector<uint8_t> data(kRecords * kRecord + kTail);
  for (size_t i = 0; i < data.size(); ++i) data[i] = byte_at(i);
  CHECK(write(fd, data.data(), data.size()) == static_cast<ssize_t>(data.size()));
  close(fd);
  return path;
}

std::vector<Completion> wait_for(Reader& reader, size_t count) {
  std::vector<Completion> all;
  while (all.size() < count) {
    for (Completion& completion : reader.wait(std::chrono::milliseconds(1000)))
      all.push_back(std::move(completion));
  }
  return all;
}

void reads_every_record(const std::string& path, DirectMode mode, EngineKind engine) {
  Reader reader({path}, mode, engine, 8);
  auto buffer = std::make_shared<AlignedBuffer>(kRecords * kRecord, true);
  for (size_t i = 0; i < kRecords; ++i) {
    const size_t record = (i * 7) % kRecords;
    reader.submit(
        {0, record * kRecord, kRecord, buffer, record * kRecord, static_cast<int64_t>(record), i % 3 == 0});
  }
  for (const Completion& completion : wait_for(reader, kRecords)) CHECK(completion.error.empty());
  for (size_t i = 0; i < kRecords * kRecord; ++i) CHECK(buffer->data()[i] == byte_at(i));
  CHECK(reader.outstanding() == 0);
  CHECK(reader.wait(std::chrono::milliseconds(1)).empty());
  CHECK(reader.stats().reads == kRecords && reader.stats().nbytes == kRecords * kRecord);
}

void reads_the_tail(const std::string& path, DirectMode mode, EngineKind engine) {
  Reader reader({path}, mode, engine, 2);
  auto buffer = std::make_shared<AlignedBuffer>(kRecord + kTail, false);
  const size_t offset = (kRecords - 1) * kRecord;
  reader.submit({0, offset, kRecord + kTail, buffer, 0, 5, false});
  CHECK(wait_for(reader, 1)[0].error.empty());
  for (size_t i = 0; i < kRecord + kTail; ++i) CHECK(buffer->data()[i] == byte_at(offset + i));
}

void refuses_bad_requests(const std::string& path, EngineKind engine) {
  Reader reader({path}, DirectMode::automatic, engine, 1);
  auto buffer = std::make_shared<AlignedBuffer>(kRecord, false);
  const auto refused = [&](ReadRequest request) {
    try {
      reader.submit(std::move(request));
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(refused({1, 0, kBlock, buffer, 0, 0, false}));
  CHECK(refused({0, kRecords * kRecord, kRecord, buffer, 0, 0, false}));
  CHECK(refused({0, 0, 2 * kRecord, buffer, 0, 0, false}));
  CHECK(refused({0, 1, kBlock, buffer, 0, 0, false}));
  CHECK(refused({0, 0, kBlock, buffer, 1, 0, false}));
  CHECK(refused({0, 0, 0, buffer, 0, 0, false}));
}

// A file that shrinks after it was opened is a short read, reported with its path.
void reports_a_short_read(DirectMode mode, EngineKind engine) {
  const std::string path = make_file();
  Reader reader({path}, mode, engine, 2);
  CHECK(truncate(path.c_str(), static_cast<off_t>(kRecord)) == 0);
  auto buffer = std::make_shared<AlignedBuffer>(kRecord, false);
  reader.submit({0, 4 * kRecord, kRecord, buffer, 0, 9, false});
  const std::vector<Completion> completions = wait_for(reader, 1);
  CHECK(completions[0].tag == 9);
  CHECK(completions[0].error.find(path) != std::string::npos);
  unlink(path.c_str());
}

void missing_file_names_its_path() {
  try {
    Reader reader({"no-such-file"}, DirectMode::automatic, EngineKind::automatic, 1);
  } catch (const std::system_error& error) {
    CHECK(std::string(error.what()).find("no-such-file") != std::string::npos);
    return;
  }
  CHECK(false);
}

// Destruction with reads queued and in flight: the buffer outlives them.
void stops_with_work_left(const std::string& path, EngineKind engine) {
  for (int round = 0; round < 20; ++round) {
    auto reader = std::make_unique<Reader>(std::vector<std::string>{path}, DirectMode::automatic, engine, 4);
    auto buffer = std::make_shared<AlignedBuffer>(kRecords * kRecord, false);
    for (size_t i = 0; i < kRecords; ++i) {
      reader->submit({0, i * kRecord, kRecord, buffer, i * kRecord, static_cast<int64_t>(i), false});
    }
    buffer.reset();
    reader.reset();
  }
}

// With one read at a time, whatever waits is served demand first, each kind in its order.
void serves_demand_first(const std::string& path, EngineKind engine) {
  Reader reader({path}, DirectMode::automatic, engine, 1);
  auto buffer = std::make_shared<AlignedBuffer>(kRecords * kRecord, false);
  // The first one is long enough for the others to be queued meanwhile, or else they are served as they come.
  reader.submit({0, 0, kRecords * kRecord, buffer, 0, 0, true});
  for (int64_t tag = 1; tag < 9; ++tag) reader.submit({0, 0, kBlock, buffer, 0, tag, tag % 2 == 0});
  int64_t last_demand = -1, last_prefetch = -1;
  for (const Completion& completion : wait_for(reader, 9)) {
    int64_t& last = completion.tag % 2 == 0 ? last_prefetch : last_demand;
    CHECK(completion.error.empty() && completion.tag > last);
    last = completion.tag;
  }
}

// Prefetches wait until at most one read is in flight, and those that wait can be taken back.
void withdraws_what_has_not_begun(const std::string& path, EngineKind engine) {
  for (int round = 0; round < 50; ++round) {
    Reader reader({path}, DirectMode::automatic, engine, 8);
    auto buffer = std::make_shared<AlignedBuffer>(kRecords * kRecord + 8 * kBlock, false);
    reader.submit({0, 0, kRecords * kRecord, buffer, 8 * kBlock, 0, false});
    for (size_t i = 0; i < 8; ++i)
      reader.submit({0, 0, kBlock, buffer, i * kBlock, static_cast<int64_t>(i) + 1, true});
    std::vector<int> seen(9);
    for (int64_t tag : reader.withdraw()) ++seen[static_cast<size_t>(tag)];
    const size_t left = reader.outstanding();
    for (const Completion& completion : wait_for(reader, left)) ++seen[static_cast<size_t>(completion.tag)];
    for (int count : seen) CHECK(count == 1);
    CHECK(reader.outstanding() == 0 && reader.withdraw().empty());
    CHECK(reader.stats().max_in_flight <= 2);
  }
}

// Several threads submit and wait at once: every read completes once, whoever receives it.
void serves_many_threads(const std::string& path, EngineKind engine) {
  constexpr int kThreads = 4, kReads = 200;
  Reader reader({path}, DirectMode::automatic, engine, 8);
  auto buffer = std::make_shared<AlignedBuffer>(kThreads * kReads * kRecord, false);
  std::vector<std::atomic<int>> seen(kThreads * kReads);
  std::atomic<int> received{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kReads; ++i) {
        const size_t record = static_cast<size_t>(i) % kRecords;
        const int tag = t * kReads + i;
        reader.submit({0, record * kRecord, kRecord, buffer, tag * kRecord, tag, i % 5 == 0});
      }
      while (received < kThreads * kReads) {
        for (const Completion& completion : reader.wait(std::chrono::milliseconds(1))) {
          CHECK(completion.error.empty());
          ++seen[static_cast<size_t>(completion.tag)];
          ++received;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::atomic<int>& count : seen) CHECK(count == 1);
  CHECK(reader.outstanding() == 0 && reader.stats().max_in_flight <= 8);
}

bool has_uring(const std::string& path) {
  try {
    Reader reader({path}, DirectMode::automatic, EngineKind::uring, 1);
    CHECK(reader.engine() == EngineKind::uring);
    return true;
  } catch (const std::runtime_error& error) {
    std::printf("io_uring is not tested: %s\n", error.what());
    return false;
  }
}

void all_tests(const std::string& path, EngineKind engine) {
  for (DirectMode mode : {DirectMode::automatic, DirectMode::off}) {
    reads_every_record(path, mode, engine);
    reads_the_tail(path, mode, engine);
    reports_a_short_read(mode, engine);
  }
  refuses_bad_requests(path, engine);
  serves_demand_first(path, engine);
  withdraws_what_has_not_begun(path, engine);
  serves_many_threads(path, engine);
  stops_with_work_left(path, engine);
}

}  // namespace

int main() {
  const std::string path = make_file();
  all_tests(path, EngineKind::threads);
  all_tests(path, EngineKind::automatic);
  if (has_uring(path)) all_tests(path, EngineKind::uring);
  missing_file_names_its_path();
  unlink(path.c_str());
  return 0;
}
