// Quantised linear layers and expert feed-forward blocks over the kernel table, split over a thread pool.
#pragma once

#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "flashmoe/quant_kernels.h"
#include "flashmoe/thread_pool.h"

namespace flashmoe {

using Matrix = std::variant<TileMatrix, DenseMatrix>;

// Memory that only grows: a decode step must not allocate.
template <class T>
class GrowOnly {
 public:
  T* at_least(int64_t count) {
    if (static_cast<int64_t>(data_.size()) < count) data_.resize(static_cast<size_t>(count));
    return data_.data();
  }
  T* data() { return data_.data(); }
  int64_t nbytes() const { return static_cast<int64_t>(data_.size() * sizeof(T)); }

 private:
  std::vector<T> data_;
};

// Quantised (or, on the f32 path, referenced) activations of some tokens, ready for any number of products.
// Holds a pointer to the floats it was made from; not thread-safe.
class TokenInput {
 public:
  // x: [tokens, cols]; cols must be a multiple of group.  The f32 path keeps x itself, which must stay valid.
  void set(const QuantKernels& kernels, ThreadPool& pool, const float* x, int64_t tokens, int64_t cols,
           int group, bool int8);
  const Activations& view() const { return view_; }
  int64_t tokens() const { return tokens_; }
  int group() const { return group_; }
  int64_t nbytes() const { return q_.nbytes() + scale_.nbytes() + sum_.nbytes(); }

 private:
  GrowOnly<int8_t> q_;
  GrowOnly<float> scale_, sum_;
  Activations view_;
  int64_t tokens_ = 0;
  int group_ = 0;
};

// Shape of one feed-forward record (docs/format.md): gate and up tiles alternating, then down.
struct FfnLayout {
  int64_t hidden = 0;
  int64_t intermediate = 0;
  TileMatrix gate_up;  // tiles = null; groups, strides and codec only
  TileMatrix down;
  int64_t down_offset = 0;

  // Columns of down: intermediate rounded up to its group.
  int64_t padded_intermediate() const { return down.groups * down.group; }
};

// Work of one expert: its record and the (token, result row) pairs it serves.
struct ExpertJob {
  const uint8_t* record = nullptr;
  int64_t first = 0;  // into the pair arrays
  int64_t count = 0;
};

// Not thread-safe: one QuantOps per inference thread; it may share the pool with other op objects.
class QuantOps {
 public:
  QuantOps(ThreadPool& pool, Isa isa, bool int8) : pool_(pool), kernels_(quant_kernels(isa)), int8_(int8) {}

  void prepare(TokenInput& input, const float* x, int64_t tokens, int64_t cols, int group);

  // outs[i][t, r] = sum_c W_i[r, c] x[t, c]; x: [tokens, cols].
  void linear(const float* x, int64_t tokens, int64_t cols, std::span<const Matrix> weights,
              std::span<float* const> outs);

  // out[t, :] = row ids[t] of the table.  Ids must be in range.
  void embed(const Matrix& table, std::span<const int32_t> ids, float* out);

  // For every job and pair p: y = ffn(record, x[tokens[p]]).
  // weights empty: out[rows[p], :] = y;  else out[rows[p], :] = fma(weights[p], y, out[rows[p], :]), jobs in
  // the order given.
  void expert_ffn(const TokenInput& input, const FfnLayout& layout, std::span<const ExpertJob> jobs,
                  std::span<const int32_t> tokens, std::span<const int32_t> rows,
                  std::span<const float> weights, float* out);

  // out[rows[p], :] = fma(weights[p], y[p, :], out[rows[p], :]) for p ascending.
  void combine(const float* y, int64_t cols, std::span<const int32_t> rows, std::span<const float> weights,
               float* out);

  void sigmoid(const float* x, int64_t n, float* out) { kernels_.sigmoid(x, n, out); }

  // Bytes per second of all threads reading `nbytes` (a multiple of 64) once; best of three passes.
  double read_bandwidth(const uint8_t* data, int64_t nbytes);

  int64_t scratch_nbytes() const;

 private:
  void linear_tiles(const TileMatrix& w, const TokenInput& input, float* out);
  void linear_dense(const DenseMatrix& w, const float* x, int64_t tokens, float* out);

  ThreadPool& pool_;
  const QuantKernels& kernels_;
  bool int8_;
  TokenInput linear_input_[2];  // groups of 32 and of 64
  TokenInput hidden_input_;
  GrowOnly<float> hidden_;
};

}  // namespace flashmoe
