#include "flashmoe/quant_ops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

namespace flashmoe {
namespace {

// A task reads about this much weight data: large against the microsecond a task hand-over costs, small
// enough to balance the last ones.  It depends on shapes only, never on the number of threads.
constexpr int64_t kTaskNbytes = 32 * 1024;

int64_t tiles_per_task(const TileMatrix& w) {
  return std::max<int64_t>(1, kTaskNbytes / std::max<int64_t>(1, w.groups * w.tile_stride));
}

int64_t tasks_of(int64_t items, int64_t per_task) { return (items + per_task - 1) / per_task; }

}  // namespace

void TokenInput::set(const QuantKernels& kernels, ThreadPool& pool, const float* x, int64_t tokens,
                     int64_t cols, int group, bool int8) {
  const int64_t groups = cols / group;
  int8_t* q = int8 ? q_.at_least(2 * tokens * cols) : nullptr;
  float* scale = scale_.at_least(tokens * groups);
  float* sum = sum_.at_least(tokens * groups);
  pool.parallel_for(tokens, [&](int64_t t) {
    if (int8) {
      kernels.quantize(x + t * cols, cols, group, q + 2 * t * cols, scale + t * groups, sum + t * groups);
    } else {
      kernels.group_sums(x + t * cols, cols, group, sum + t * groups);
    }
  });
  view_ = {q, x, scale, sum, cols, groups};
  tokens_ = tokens;
  group_ = group;
}

void QuantOps::prepare(TokenInput& input, const float* x, int64_t tokens, int64_t cols, int group) {
  input.set(kernels_, pool_, x, tokens, cols, group, int8_);
}

void QuantOps::linear_tiles(const TileMatrix& w, const TokenInput& input, float* out) {
  const int64_t per_task = tiles_per_task(w);
  const TokenRows tokens{input.tokens(), nullptr, nullptr, nullptr};
  pool_.parallel_for(tasks_of(w.row_tiles(), per_task), [&](int64_t task) {
    const int64_t begin = task * per_task;
    kernels_.matmul(w, input.view(), tokens, begin, std::min(begin + per_task, w.row_tiles()), out, w.rows);
  });
}

void QuantOps::linear_dense(const DenseMatrix& w, const float* x, int64_t tokens, float* out) {
  const int64_t per_task = std::max<int64_t>(1, kTaskNbytes / (4 * w.cols));
  const int64_t blocks = tasks_of(w.rows, per_task);
  pool_.parallel_for(blocks * tokens, [&](int64_t task) {
    const int64_t t = task / blocks, begin = task % blocks * per_task;
    kernels_.dense(w, x + t * w.cols, begin, std::min(begin + per_task, w.rows), out + t * w.rows);
  });
}

void QuantOps::linear(const float* x, int64_t tokens, int64_t cols, std::span<const Matrix> weights,
                      std::span<float* const> outs) {
  bool ready[2] = {false, false};
  for (size_t i = 0; i < weights.size(); ++i) {
    if (const auto* dense = std::get_if<DenseMatrix>(&weights[i])) {
      linear_dense(*dense, x, tokens, outs[i]);
      continue;
    }
    const TileMatrix& w = std::get<TileMatrix>(weights[i]);
    const int slot = w.group == 64 ? 1 : 0;
    if (!ready[slot]) prepare(linear_input_[slot], x, tokens, cols, w.group);
    ready[slot] = true;
    linear_tiles(w, linear_input_[slot], outs[i]);
  }
}

void QuantOps::embed(const Matrix& table, std::span<const int32_t> ids, float* out) {
  pool_.parallel_for(static_cast<int64_t>(ids.size()), [&](int64_t t) {
    const int64_t id = ids[static_cast<size_t>(t)];
    if (const auto* w = std::get_if<TileMatrix>(&table)) {
      kernels_.dequantize_row(*w, id, out + t * w->groups * w->group);
      return;
    }
    const DenseMatrix& w = std::get<DenseMatrix>(table);
    float* row = out + t * w.cols;
    if (w.type == DenseMatrix::Type::f32) {
      std::memcpy(row, static_cast<const float*>(w.data) + id * w.cols, static_cast<size_t>(4 * w.cols));
      return;
    }
    // A one-hot product is exact and needs no second 16-bit decoder.
    const float one = 1.0f;
    for (int64_t c = 0; c < w.cols; ++c) {
      const DenseMatrix cell{static_cast<const uint16_t*>(w.data) + id * w.cols + c, 1, 1, w.type};
      kernels_.dense(cell, &one, 0, 1, row + c);
    }
  });
}

void QuantOps::expert_ffn(const TokenInput& input, const FfnLayout& layout, std::span<const ExpertJob> jobs,
                          std::span<const int32_t> tokens, std::span<const int32_t> rows,
                          std::span<const float> weights, float* out) {
  const int64_t n_jobs = static_cast<int64_t>(jobs.size());
  const int64_t pairs = static_cast<int64_t>(tokens.size());
  const int64_t width = layout.padded_intermediate();
  float* hidden = hidden_.at_least(pairs * width);
  if (width > layout.intermediate) std::fill(hidden, hidden + pairs * width, 0.0f);

  const int64_t up_step = tiles_per_task(layout.gate_up);
  const int64_t up_blocks = tasks_of(layout.gate_up.row_tiles(), up_step);
  pool_.parallel_for(n_jobs * up_blocks, [&](int64_t task) {
    const ExpertJob& job = jobs[static_cast<size_t>(task / up_blocks)];
    const int64_t begin = task % up_blocks * up_step;
    TileMatrix w = layout.gate_up;
    w.tiles = job.record;
    const TokenRows feed{job.count, tokens.data() + job.first, nullptr, nullptr};
    kernels_.matmul_glu(w, input.view(), feed, begin, std::min(begin + up_step, w.row_tiles()),
                        hidden + job.first * width, width);
  });

  prepare(hidden_input_, hidden, pairs, width, layout.down.group);

  // Jobs are the inner loop: a block of output rows belongs to one task, so results that several experts
  // add to are summed in the order of the jobs whatever the threads do.
  const int64_t down_step = tiles_per_task(layout.down);
  const int64_t down_blocks = tasks_of(layout.down.row_tiles(), down_step);
  const bool shared_rows = !weights.empty();
  const int64_t outer = shared_rows ? 1 : n_jobs;
  pool_.parallel_for(outer * down_blocks, [&](int64_t task) {
    const int64_t begin = task % down_blocks * down_step;
    const int64_t first = shared_rows ? 0 : task / down_blocks, last = shared_rows ? n_jobs : first + 1;
    for (int64_t j = first; j < last; ++j) {
      const ExpertJob& job = jobs[static_cast<size_t>(j)];
      TileMatrix w = layout.down;
      w.tiles = job.record + layout.down_offset;
      Activations x = hidden_input_.view();
      x.q = x.q != nullptr ? x.q + 2 * job.first * x.cols : nullptr;
      x.x += job.first * x.cols;
      x.scale += job.first * x.groups;
      x.sum += job.first * x.groups;
      const TokenRows feed{job.count, nullptr, rows.data() + job.first,
                           shared_rows ? weights.data() + job.first : nullptr};
      kernels_.matmul(w, x, feed, begin, std::min(begin + down_step, w.row_tiles()), out, layout.hidden);
    }
  });
}

void QuantOps::combine(const float* y, int64_t cols, std::span<const int32_t> rows,
                       std::span<const float> weights, float* out) {
  constexpr int64_t kColumns = 1024;  // 4 KiB of sums a task
  pool_.parallel_for(tasks_of(cols, kColumns), [&](int64_t task) {
    const int64_t begin = task * kColumns, n = std::min(kColumns, cols - begin);
    for (size_t p = 0; p < rows.size(); ++p) {
      kernels_.accumulate(weights[p], y + static_cast<int64_t>(p) * cols + begin, n,
                          out + rows[p] * cols + begin);
    }
  });
}

double QuantOps::read_bandwidth(const uint8_t* data, int64_t nbytes) {
  constexpr int64_t kBlock = 1 << 20;
  double best = 0.0;
  std::atomic<uint32_t> sink{0};
  for (int pass = 0; pass < 3; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool_.parallel_for(tasks_of(nbytes, kBlock), [&](int64_t task) {
      const int64_t begin = task * kBlock;
      sink.fetch_or(kernels_.read_all(data + begin, std::min(kBlock, nbytes - begin)),
                    std::memory_order_relaxed);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(nbytes) / elapsed.count());
  }
  return best;
}

int64_t QuantOps::scratch_nbytes() const {
  return linear_input_[0].nbytes() + linear_input_[1].nbytes() + hidden_input_.nbytes() + hidden_.nbytes();
}

}  // namespace flashmoe
