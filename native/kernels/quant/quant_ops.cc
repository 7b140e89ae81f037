#include "flashmoe/quant_ops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

namespace flashmoe {

namespace {

// Sums of neighbouring tokens share cache lines, sixteen to a line: threads that took turns token by token
// wrested them from each other, and a group of 64 values took 600 cycles instead of 60.
constexpr int64_t kLineTokens = 16;

}  // namespace

void PlaneBuffer::reserve(int64_t values) {
  const int64_t groups = values / 32 + 2;
  codes_.at_least(2 * values);
  scale_.at_least(2 * groups);
  sum_.at_least(2 * groups);
  fine_sum_.at_least(2 * groups);
  token_.at_least(2 * groups);
  fine_.at_least(groups);
  low_at_.at_least(groups);
  marked_.at_least(groups);
}

PlaneRows PlaneBuffer::rows(int64_t offset, int64_t tokens) {
  const int64_t group = offset / 32;
  return {codes_.data() + 2 * offset,   scale_.data() + 2 * group, sum_.data() + 2 * group,
          fine_sum_.data() + 2 * group, token_.data() + 2 * group, fine_.data() + group,
          low_at_.data() + group,       marked_.data() + group,    tokens};
}

int64_t PlaneBuffer::nbytes() const {
  return codes_.nbytes() + scale_.nbytes() + sum_.nbytes() + fine_sum_.nbytes() + token_.nbytes() +
         fine_.nbytes() + low_at_.nbytes() + marked_.nbytes();
}

void TokenInput::set(const QuantKernels& kernels, ThreadPool& pool, const FloatRows& x, int64_t tokens,
                     bool int8) {
  x_ = x.x;
  tokens_ = tokens;
  cols_ = x.cols;
  group_ = x.group;
  int8_ = int8;
  if (int8) {
    planes_.reserve(tokens * x.cols);
    rows_ = planes_.rows(0, tokens);
    return quantize_rows(kernels, pool, x, rows_);
  }
  float* sums = f32_sums_.at_least(tokens * x.cols / x.group);
  const int64_t together = tokens >= 2 * kLineTokens ? kLineTokens : 1;
  pool.parallel_for(tasks_of(tokens, together), [&](int64_t task) {
    const int64_t end = std::min(tokens, (task + 1) * together);
    for (int64_t t = task * together; t < end; ++t) {
      kernels.group_sums(x.x + t * x.cols, x.cols, x.group, t, tokens, sums);
    }
  });
}

Activations TokenInput::view(bool precise) const {
  if (int8_) return activations_of(rows_, precise, cols_);
  Activations view;
  view.x = x_;
  view.sums = f32_sums_.data();
  view.tokens = tokens_;
  view.cols = cols_;
  return view;
}

namespace {

// A constant length lets the compiler copy in registers: a call for each line took 5 % of a product.
void copy_row(const PlaneRows& from, int64_t at, const PlaneRows& to, int64_t to_at, int group,
              int64_t token) {
  if (group == 64) {
    std::memcpy(to.codes + to_at * 64, from.codes + at * 64, 64);
  } else {
    std::memcpy(to.codes + to_at * 32, from.codes + at * 32, 32);
  }
  to.scale[to_at] = from.scale[at];
  to.sum[to_at] = from.sum[at];
  to.fine_sum[to_at] = from.fine_sum[at];
  to.token[to_at] = static_cast<uint8_t>(token);
}

int64_t block_tokens(int64_t tokens, int64_t first) { return std::min(kTokenBlock, tokens - first); }

// Tasks for each thread: enough to level out the end.
constexpr int64_t kTasksEach = 2;
// Fewer tokens are quantised before another thread has heard of it.
constexpr int64_t kFewTokens = 16;

}  // namespace

void quantize_rows(const QuantKernels& kernels, ThreadPool& pool, const FloatRows& x, const PlaneRows& out) {
  if (out.tokens == 0) return;
  const int64_t blocks = tasks_of(out.tokens, kTokenBlock), groups = x.cols / x.group;
  const int64_t wanted = pool.threads() > 1 && out.tokens >= kFewTokens ? kTasksEach * pool.threads() : 1;
  const int64_t together = tasks_of(groups, tasks_of(wanted, blocks)), ranges = tasks_of(groups, together);
  pool.parallel_for(blocks * ranges, [&](int64_t task) {
    const int64_t begin = task % ranges * together;
    kernels.quantize(x, task / ranges * kTokenBlock, begin, std::min(groups, begin + together), out);
  });
}

void quantize_rows(const QuantKernels& kernels, const FloatRows& x, const PlaneRows& out) {
  for (int64_t first = 0; first < out.tokens; first += kTokenBlock) {
    kernels.quantize(x, first, 0, x.cols / x.group, out);
  }
}

void TokenInput::gather(std::span<const int32_t> chosen, bool precise, const PlaneRows& to) const {
  const int64_t groups = cols_ / group_;
  for (int64_t first = 0; first < to.tokens; first += kTokenBlock) {
    const int64_t count = block_tokens(to.tokens, first);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = first_row(groups, first, count, g);
      int64_t low = 0;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t token = chosen[static_cast<size_t>(first + t)];
        const int64_t begin = token / kTokenBlock * kTokenBlock, many = block_tokens(tokens_, begin);
        const int64_t from = first_row(groups, begin, many, g), at = plane_index(groups, tokens_, token, g);
        copy_row(rows_, from + token - begin, to, row + t, group_, t);
        if (!precise && rows_.fine[at] == 0) continue;
        copy_row(rows_, from + many + rows_.low_at[at], to, row + count + low++, group_, t);
      }
      to.marked[first / kTokenBlock * groups + g] = static_cast<uint8_t>(low);
    }
  }
}

void TokenInput::gather_f32(std::span<const int32_t> chosen, float* x, float* sums) const {
  const int64_t count = static_cast<int64_t>(chosen.size()), groups = cols_ / group_;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = chosen[static_cast<size_t>(i)];
    std::memcpy(x + i * cols_, x_ + from * cols_, static_cast<size_t>(4 * cols_));
    for (int64_t g = 0; g < groups; ++g) {
      sums[plane_index(groups, count, i, g)] = f32_sums_.data()[plane_index(groups, tokens_, from, g)];
    }
  }
}

void QuantOps::prepare(TokenInput& input, const float* x, int64_t tokens, int64_t cols, int group) {
  // A shared block that is precise may take it too.
  input.set(kernels_, pool_, {x, cols, cols, group, kCoarseLimit, true}, tokens, int8_);
}

void QuantOps::linear(const float* x, int64_t tokens, int64_t cols, std::span<const Matrix> weights,
                      std::span<float* const> outs, bool precise, bool gated) {
  multiply({x, cols, cols, 0, gated ? kCoarseLimitGated : kCoarseLimit, precise}, tokens, weights, outs,
           precise);
}

void QuantOps::multiply(FloatRows x, int64_t tokens, std::span<const Matrix> weights,
                        std::span<float* const> outs, bool precise) {
  WorkRun runs[kMaxLinearWeights];
  bool ready[2] = {false, false};
  for (size_t i = 0; i < weights.size(); ++i) {
    if (const auto* dense = std::get_if<DenseMatrix>(&weights[i])) {
      runs[i] = {tasks_of(dense->rows, kTileRows), kTileRows * 4 * dense->cols};
      continue;
    }
    const TileMatrix& w = std::get<TileMatrix>(weights[i]);
    const int slot = w.group == 64 ? 1 : 0;
    x.group = w.group;
    if (!ready[slot]) linear_input_[slot].set(kernels_, pool_, x, tokens, int8_);
    ready[slot] = true;
    runs[i] = {w.row_tiles(), w.groups * w.tile_stride};
  }
  split_.cut({runs, weights.size()}, pool_.threads(), kTaskNbytes);
  pool_.parallel_for(split_.tasks(), [&](int64_t task) {
    split_.for_each_piece(task, [&](size_t i, int64_t begin, int64_t end) {
      multiply_rows(weights[i], x.x, tokens, precise, begin, end, outs[i]);
    });
  });
}

void QuantOps::multiply_rows(const Matrix& matrix, const float* x, int64_t tokens, bool precise,
                             int64_t tile_begin, int64_t tile_end, float* out) {
  if (const auto* dense = std::get_if<DenseMatrix>(&matrix)) {
    const int64_t end = std::min(tile_end * kTileRows, dense->rows);
    for (int64_t t = 0; t < tokens; ++t) {
      kernels_.dense(*dense, x + t * dense->cols, tile_begin * kTileRows, end, out + t * dense->rows);
    }
    return;
  }
  const TileMatrix& w = std::get<TileMatrix>(matrix);
  const TokenRows everyone{nullptr, nullptr};
  kernels_.matmul(w, linear_input_[w.group == 64 ? 1 : 0].view(precise), everyone, tile_begin, tile_end, out,
                  w.rows);
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

namespace {

// Units per second of a pass over `units`; the best of three, because a busy machine only ever slows one
// down.
template <class Pass>
double best_rate(double units, Pass&& pass) {
  double best = 0.0;
  for (int i = 0; i < 3; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pass();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, units / elapsed.count());
  }
  return best;
}

}  // namespace

double QuantOps::read_bandwidth(const uint8_t* data, int64_t nbytes) {
  constexpr int64_t kBlock = 1 << 20;
  std::atomic<uint32_t> sink{0};
  return best_rate(static_cast<double>(nbytes), [&] {
    pool_.parallel_for(tasks_of(nbytes, kBlock), [&](int64_t task) {
      const int64_t begin = task * kBlock;
      sink.fetch_or(kernels_.read_all(data + begin, std::min(kBlock, nbytes - begin)),
                    std::memory_order_relaxed);
    });
  });
}

double QuantOps::int8_peak() {
  constexpr int64_t kRounds = 2000;  // 7 ms at one dot product a cycle
  const int64_t tasks = 8 * pool_.threads();
  std::atomic<uint32_t> sink{0};
  return best_rate(static_cast<double>(tasks * kRounds * kPeakMultiplyAdds), [&] {
    pool_.parallel_for(tasks, [&](int64_t) {
      sink.fetch_or(kernels_.multiply_registers(kRounds), std::memory_order_relaxed);
    });
  });
}

int64_t QuantOps::scratch_nbytes() const {
  return linear_input_[0].nbytes() + linear_input_[1].nbytes() + hidden_planes_.nbytes() + hidden_.nbytes() +
         gathered_planes_.nbytes() + gathered_.nbytes() + hidden_sums_.nbytes() + apart_.nbytes() +
         head_planes_.nbytes() + head_rows_.nbytes();
}

}  // namespace flashmoe
