// Feed-forward blocks of several experts as two parallel regions, whatever the number of experts and tokens.
#include <algorithm>
#include <atomic>

#include "flashmoe/quant_ops.h"

namespace flashmoe {

namespace {

// A row tile met by one token takes as long as its bytes; each further token adds about a third (measured:
// 50 cycles a group for one token, 85 for four, 160 for eight).
WorkRun run_of(const TileMatrix& w, int64_t count) {
  if (count == 0) return {};
  return {w.row_tiles(), std::max<int64_t>(1, w.groups * w.tile_stride * (2 + count) / 3)};
}

// Pairs whose results are kept apart and summed afterwards, 16 tokens' with ten experts (nn/moe.py plans for
// them).  Each record's down projection is then one stretch of memory; as a range of columns of one record
// after the other it got 24 GB/s instead of 28.
constexpr int64_t kApart = 192;

// A range of columns meets every job, whose planes then come from the third-level cache: few ranges, nearly
// all columns in the first of each thread and at least a 32nd in the rest.  With halves of what is left down
// to kTaskNbytes a down projection of 4 tokens an expert took 1.12 times as long, of 16 tokens 1.07.
constexpr double kFirstShare = 0.9;
constexpr int64_t kMostRanges = 32;

// Room of a job in a shared buffer: cache lines of its own.
int64_t padded(int64_t values) { return tasks_of(values, 64) * 64; }

}  // namespace

// One job while it runs.  Its values between the two products stand from `offset` on, [count, width].
struct QuantOps::Job {
  ExpertJob work;
  Activations input;
  int64_t offset = 0;
  int64_t gathered = -1;               // where its input rows are gathered; -1: it takes them all
  std::atomic<int64_t> tiles_left{0};  // of gate and up

  Job() = default;
  Job(Job&& other) noexcept { *this = std::move(other); }
  // Only between runs, when nobody counts down.
  Job& operator=(Job&& other) noexcept {
    work = other.work;
    input = other.input;
    gathered = other.gathered;
    offset = other.offset;
    tiles_left.store(other.tiles_left.load(std::memory_order_relaxed), std::memory_order_relaxed);
    return *this;
  }

  const uint8_t* down_tiles(int64_t tile) const {
    const TileMatrix& down = work.layout->down;
    return work.record + work.layout->down_offset + tile * down.groups * down.tile_stride;
  }
  int64_t width() const { return work.layout->padded_intermediate(); }
};

QuantOps::QuantOps(ThreadPool& pool, Isa isa, bool int8)
    : pool_(pool), kernels_(quant_kernels(isa)), int8_(int8) {}

QuantOps::~QuantOps() = default;

void QuantOps::lay_out(std::span<const ExpertJob> jobs, std::span<const int32_t> tokens) {
  jobs_.resize(jobs.size());
  int64_t offset = 0, gathered = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    Job& job = jobs_[j];
    const int64_t count = jobs[j].count;
    job.work = jobs[j];
    job.offset = offset;
    job.tiles_left.store(jobs[j].layout->gate_up.row_tiles(), std::memory_order_relaxed);
    offset += padded(count * job.width());
    const int32_t* mine = tokens.data() + job.work.first;
    const bool everyone = count == job.work.input->tokens() && mine[0] == 0 &&
                          std::adjacent_find(mine, mine + count,
                                             [](int32_t a, int32_t b) { return b != a + 1; }) == mine + count;
    job.gathered = everyone || count == 0 ? -1 : gathered;
    if (job.gathered >= 0) gathered += padded(count * job.work.input->cols());
    if (everyone) {
      job.input = job.work.input->view(job.work.precise);
    }
  }
  hidden_.at_least(offset);
  if (int8_) {
    hidden_planes_.reserve(offset);
    gathered_planes_.reserve(gathered);
  } else {
    hidden_sums_.at_least(offset / 32);
    gathered_.at_least(gathered + gathered / 32);
  }
}

// Brings a job's input rows together: products over neighbours need no address for each token.
void QuantOps::gather(Job& job, std::span<const int32_t> tokens) {
  if (job.gathered < 0) return;
  const TokenInput& input = *job.work.input;
  const int64_t count = job.work.count;
  const std::span<const int32_t> mine =
      tokens.subspan(static_cast<size_t>(job.work.first), static_cast<size_t>(count));
  if (int8_) {
    const PlaneRows rows = gathered_planes_.rows(job.gathered, count);
    input.gather(mine, job.work.precise, rows);
    job.input = activations_of(rows, job.work.precise, input.cols());
    return;
  }
  // Each job's group sums stand after its rows.
  float* x = gathered_.data() + job.gathered + job.gathered / 32;
  float* sums = x + count * input.cols();
  input.gather_f32(mine, x, sums);
  job.input = {};
  job.input.x = x;
  job.input.sums = sums;
  job.input.tokens = count;
  job.input.cols = input.cols();
}

Activations QuantOps::hidden_view(const Job& job) {
  const int64_t count = job.work.count;
  if (int8_) return activations_of(hidden_planes_.rows(job.offset, count), job.work.precise, job.width());
  Activations view;
  view.x = hidden_.data() + job.offset;
  view.sums = hidden_sums_.data() + job.offset / 32;
  view.tokens = count;
  view.cols = job.width();
  return view;
}

// Gate, up and their product for some row tiles; whoever finishes a job's last ones quantises its result,
// which saves a third parallel region.
void QuantOps::run_up(Job& job, int64_t tile_begin, int64_t tile_end, const uint8_t* after) {
  const FfnLayout& layout = *job.work.layout;
  const int64_t width = job.width(), tiles = tile_end - tile_begin;
  TileMatrix w = layout.gate_up;
  w.tiles = job.work.record;
  w.after = after;
  const TokenRows feed{nullptr, nullptr};
  float* hidden = hidden_.data() + job.offset;
  kernels_.matmul_glu(w, layout.glu(job.work.record), job.input, feed, tile_begin, tile_end, hidden, width);
  if (job.tiles_left.fetch_sub(tiles, std::memory_order_acq_rel) != tiles) return;
  for (int64_t t = 0; t < job.work.count; ++t) {
    float* row = hidden + t * width;
    std::fill(row + layout.intermediate, row + width, 0.0f);
    if (!int8_) {
      kernels_.group_sums(row, width, layout.down.group, t, job.work.count,
                          hidden_sums_.data() + job.offset / 32);
    }
  }
  if (!int8_) return;
  quantize_rows(kernels_, {hidden, width, width, layout.down.group, kCoarseLimitGated, job.work.precise},
                hidden_planes_.rows(job.offset, job.work.count));
}

void QuantOps::run_down(const Job& job, int64_t tile_begin, int64_t tile_end, const uint8_t* after,
                        const int32_t* rows, const float* weights, float* out) {
  TileMatrix w = job.work.layout->down;
  w.tiles = job.work.record + job.work.layout->down_offset;
  w.after = after;
  w.bias = job.work.layout->down_bias(job.work.record);
  const int64_t hidden = job.work.layout->hidden, first = job.work.first;
  const TokenRows feed{rows != nullptr ? rows + first : nullptr,
                       weights != nullptr ? weights + first : nullptr};
  kernels_.matmul(w, hidden_view(job), feed, tile_begin, tile_end,
                  rows != nullptr ? out : out + first * hidden, hidden);
}

void QuantOps::expert_ffn(std::span<const ExpertJob> jobs, std::span<const int32_t> tokens,
                          std::span<const int32_t> rows, std::span<const float> weights, float* out) {
  if (jobs.empty()) return;
  lay_out(jobs, tokens);
  if (std::any_of(jobs_.begin(), jobs_.end(), [](const Job& job) { return job.gathered >= 0; })) {
    pool_.parallel_for(static_cast<int64_t>(jobs.size()),
                       [&](int64_t j) { gather(jobs_[static_cast<size_t>(j)], tokens); });
  }
  runs_.clear();
  for (const Job& job : jobs_) runs_.push_back(run_of(job.work.layout->gate_up, job.work.count));
  split_.cut(runs_, pool_.threads(), kTaskNbytes);
  pool_.parallel_for(split_.tasks(), [&](int64_t task) {
    split_.for_each_piece(task, [&](size_t j, int64_t begin, int64_t end) {
      // The next job's record begins with its gate and up; what a last piece goes on with is not known.
      const uint8_t* after = j + 1 < jobs_.size() ? jobs_[j + 1].work.record : nullptr;
      run_up(jobs_[j], begin, end, end == runs_[j].items ? after : nullptr);
    });
  });

  const int64_t pairs = static_cast<int64_t>(tokens.size()), hidden = jobs_.front().work.layout->hidden;
  if (weights.empty()) {
    down_each(rows.data(), out);
  } else if (pairs <= kApart) {
    down_each(nullptr, apart_.at_least(pairs * hidden));
    combine(apart_.data(), hidden, rows, weights, out);
  } else {
    down_summed(rows.data(), weights.data(), out);
  }
}

// Results of all pairs, each in its row; rows null: pair p's in row p.
void QuantOps::down_each(const int32_t* rows, float* out) {
  runs_.clear();
  for (const Job& job : jobs_) runs_.push_back(run_of(job.work.layout->down, job.work.count));
  split_.cut(runs_, pool_.threads(), kTaskNbytes);
  pool_.parallel_for(split_.tasks(), [&](int64_t task) {
    split_.for_each_piece(task, [&](size_t j, int64_t begin, int64_t end) {
      const bool last = end == runs_[j].items && j + 1 < jobs_.size();
      run_down(jobs_[j], begin, end, last ? jobs_[j + 1].down_tiles(0) : nullptr, rows, nullptr, out);
    });
  });
}

// Weighted results added to their rows.  Jobs are the inner loop where they add to the same rows: a range of
// columns belongs to one task, so results are summed in the order of the jobs whatever the threads do.
void QuantOps::down_summed(const int32_t* rows, const float* weights, float* out) {
  WorkRun columns{jobs_.front().work.layout->down.row_tiles(), 0};
  for (const Job& job : jobs_) columns.cost += run_of(job.work.layout->down, job.work.count).cost;
  split_.cut({&columns, 1}, pool_.threads(), columns.items * columns.cost / kMostRanges, kFirstShare);
  pool_.parallel_for(split_.tasks(), [&](int64_t task) {
    split_.for_each_piece(task, [&](size_t, int64_t begin, int64_t end) {
      for (size_t j = 0; j < jobs_.size(); ++j) {
        const uint8_t* after = j + 1 < jobs_.size() ? jobs_[j + 1].down_tiles(begin) : nullptr;
        run_down(jobs_[j], begin, end, after, rows, weights, out);
      }
    });
  });
}

}  // namespace flashmoe
