// Feed-forward blocks of several experts as two parallel regions, whatever the number of experts and tokens.
#include <algorithm>
#include <atomic>

#include "flashmoe/quant_ops.h"
#include "kernels/quant/work_split.h"

namespace flashmoe {

namespace {

// Room of a job in a shared buffer: cache lines of its own.
int64_t padded(int64_t values) { return tasks_of(values, 64) * 64; }

}  // namespace

// One job while it runs.  Its values between the two products stand from `offset` on, [count, width].
struct QuantOps::Job {
  ExpertJob work;
  Activations input;
  int64_t offset = 0;
  int64_t gathered = -1;  // where its input rows are gathered; -1: they are neighbours already
  int64_t first_task = 0;
  int64_t per_task = 0;
  std::atomic<int64_t> tasks_left{0};

  Job() = default;
  Job(Job&& other) noexcept { *this = std::move(other); }
  // Only between runs, when nobody counts down.
  Job& operator=(Job&& other) noexcept {
    work = other.work;
    input = other.input;
    gathered = other.gathered;
    offset = other.offset;
    first_task = other.first_task;
    per_task = other.per_task;
    tasks_left.store(other.tasks_left.load(std::memory_order_relaxed), std::memory_order_relaxed);
    return *this;
  }

  int64_t width() const { return work.layout->padded_intermediate(); }
};

QuantOps::QuantOps(ThreadPool& pool, Isa isa, bool int8)
    : pool_(pool), kernels_(quant_kernels(isa)), int8_(int8) {}

QuantOps::~QuantOps() = default;

void QuantOps::lay_out(std::span<const ExpertJob> jobs, std::span<const int32_t> tokens) {
  jobs_.resize(jobs.size());
  int64_t offset = 0, gathered = 0, tasks = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    Job& job = jobs_[j];
    const TileMatrix& up = jobs[j].layout->gate_up;
    const int64_t count = jobs[j].count;
    job.work = jobs[j];
    job.offset = offset;
    job.first_task = tasks;
    job.per_task = tiles_per_task(up, count);
    const int64_t blocks = count > 0 ? tasks_of(up.row_tiles(), job.per_task) : 0;
    job.tasks_left.store(blocks, std::memory_order_relaxed);
    tasks += blocks;
    offset += padded(count * job.width());
    const int32_t* mine = tokens.data() + job.work.first;
    const bool neighbours = std::adjacent_find(mine, mine + count, [](int32_t a, int32_t b) {
                              return b != a + 1;
                            }) == mine + count;
    job.gathered = neighbours ? -1 : gathered;
    if (!neighbours) gathered += padded(count * job.work.input->cols());
    if (neighbours && count > 0) {
      job.input = rows_from(job.work.input->view(job.work.precise), mine[0], job.work.input->group());
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
    const QuantizedRows rows = gathered_planes_.rows(job.gathered, count);
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
  job.input.sum = sums;
  job.input.tokens = count;
  job.input.cols = input.cols();
}

Activations QuantOps::hidden_view(const Job& job) {
  const int64_t count = job.work.count;
  if (int8_) return activations_of(hidden_planes_.rows(job.offset, count), job.work.precise, job.width());
  Activations view;
  view.x = hidden_.data() + job.offset;
  view.sum = hidden_sums_.data() + job.offset / 32;
  view.tokens = count;
  view.cols = job.width();
  return view;
}

// Gate, up and their product for some row tiles; whoever finishes a job's last task quantises its result,
// which saves a third parallel region.
void QuantOps::run_up_task(Job& job, int64_t task) {
  const FfnLayout& layout = *job.work.layout;
  const int64_t begin = task * job.per_task, width = job.width();
  TileMatrix w = layout.gate_up;
  w.tiles = job.work.record;
  const TokenRows feed{job.work.count, nullptr, nullptr};
  float* hidden = hidden_.data() + job.offset;
  kernels_.matmul_glu(w, job.input, feed, begin, std::min(begin + job.per_task, w.row_tiles()), hidden,
                      width);
  if (job.tasks_left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  for (int64_t t = 0; t < job.work.count; ++t) {
    float* row = hidden + t * width;
    std::fill(row + layout.intermediate, row + width, 0.0f);
    if (int8_) {
      kernels_.quantize(row, width, layout.down.group, kCoarseLimitHidden, t,
                        hidden_planes_.rows(job.offset, job.work.count));
    } else {
      kernels_.group_sums(row, width, layout.down.group, t, job.work.count,
                          hidden_sums_.data() + job.offset / 32);
    }
  }
}

void QuantOps::run_down_task(int64_t begin, int64_t end, const Job& job, const int32_t* rows,
                             const float* weights, float* out) {
  TileMatrix w = job.work.layout->down;
  w.tiles = job.work.record + job.work.layout->down_offset;
  const TokenRows feed{job.work.count, rows + job.work.first,
                       weights != nullptr ? weights + job.work.first : nullptr};
  kernels_.matmul(w, hidden_view(job), feed, begin, std::min(end, w.row_tiles()), out,
                  job.work.layout->hidden);
}

void QuantOps::expert_ffn(std::span<const ExpertJob> jobs, std::span<const int32_t> tokens,
                          std::span<const int32_t> rows, std::span<const float> weights, float* out) {
  if (jobs.empty()) return;
  lay_out(jobs, tokens);
  if (std::any_of(jobs_.begin(), jobs_.end(), [](const Job& job) { return job.gathered >= 0; })) {
    pool_.parallel_for(static_cast<int64_t>(jobs.size()),
                       [&](int64_t j) { gather(jobs_[static_cast<size_t>(j)], tokens); });
  }
  const Job& last = jobs_.back();
  const int64_t up_tasks =
      last.first_task +
      (last.work.count > 0 ? tasks_of(last.work.layout->gate_up.row_tiles(), last.per_task) : 0);
  pool_.parallel_for(up_tasks, [&](int64_t task) {
    auto job = std::upper_bound(jobs_.begin(), jobs_.end(), task,
                                [](int64_t t, const Job& j) { return t < j.first_task; });
    --job;
    run_up_task(*job, task - job->first_task);
  });

  // Jobs are the inner loop where they add to the same rows: a block of columns belongs to one task, so
  // results are summed in the order of the jobs whatever the threads do.
  const TileMatrix& down = jobs.front().layout->down;
  const int64_t n_jobs = static_cast<int64_t>(jobs.size());
  const bool summed = !weights.empty();
  const int64_t per_job = tiles_per_task(down, static_cast<int64_t>(tokens.size()) / n_jobs);
  const int64_t per_task = summed ? std::max<int64_t>(2, per_job / n_jobs) : per_job;
  const int64_t blocks = tasks_of(down.row_tiles(), per_task);
  pool_.parallel_for((summed ? 1 : n_jobs) * blocks, [&](int64_t task) {
    const int64_t begin = task % blocks * per_task;
    const int64_t from = summed ? 0 : task / blocks, to = summed ? n_jobs : from + 1;
    for (int64_t j = from; j < to; ++j) {
      run_down_task(begin, begin + per_task, jobs_[static_cast<size_t>(j)], rows.data(),
                    summed ? weights.data() : nullptr, out);
    }
  });
}

}  // namespace flashmoe
