// Quantised linear layers and expert feed-forward blocks over the kernel table, split over a thread pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <variant>
#include <vector>

#include "flashmoe/quant_kernels.h"
#include "flashmoe/thread_pool.h"
#include "flashmoe/work_split.h"

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
  const T* data() const { return data_.data(); }
  int64_t nbytes() const { return static_cast<int64_t>(data_.size() * sizeof(T)); }

 private:
  std::vector<T> data_;
};

// Groups whose largest value exceeds this many times the row's root mean square get a low plane: 3 % of them
// when values are normally distributed.  Products of a value and its gate have longer tails: two thirds of
// the groups of an output projection's input would be marked with the lower limit, for no accuracy that can
// be measured (docs/experiments.md).
constexpr float kCoarseLimit = 3.25f;
constexpr float kCoarseLimitGated = 4.5f;

// Of a token's logits those of so many row tiles count every low plane: whatever is likely, at a thousandth
// of what it would cost for all of a large vocabulary.
constexpr int64_t kSureTiles = 64;

// Planes of some tokens' activations in memory that only grows.
class PlaneBuffer {
 public:
  // Room for `values` activations in groups of at least 32.
  void reserve(int64_t values);
  // Rows and groups from value `offset` on, which is a multiple of 64; `tokens` rows.
  PlaneRows rows(int64_t offset, int64_t tokens);
  int64_t nbytes() const;

 private:
  GrowOnly<int8_t> codes_;
  GrowOnly<float> scale_, sum_, fine_sum_;
  GrowOnly<uint8_t> token_, fine_, low_at_, marked_;
};

// The planes as kernels read them; precise: the low plane counts in every group.
inline Activations activations_of(const PlaneRows& rows, bool precise, int64_t cols) {
  return {rows, precise, nullptr, nullptr, rows.tokens, cols};
}

// All planes of out.tokens tokens, with the pool's threads or the caller's alone.
void quantize_rows(const QuantKernels& kernels, ThreadPool& pool, const FloatRows& x, const PlaneRows& out);
void quantize_rows(const QuantKernels& kernels, const FloatRows& x, const PlaneRows& out);

// Quantised (or, on the f32 path, referenced) activations of some tokens, ready for any number of products.
// Holds a pointer to the floats it was made from; not thread-safe.
class TokenInput {
 public:
  // x: rows one after another.  The f32 path keeps them where they are; they must stay valid.
  void set(const QuantKernels& kernels, ThreadPool& pool, const FloatRows& x, int64_t tokens, bool int8);
  // precise: the low plane counts in every group; here and in gather only when x.every was set.
  Activations view(bool precise) const;
  // Copies the rows `chosen` to `to` (int8 path) or `x` (f32 path, with their group sums to `sums`).
  void gather(std::span<const int32_t> chosen, bool precise, const PlaneRows& to) const;
  void gather_f32(std::span<const int32_t> chosen, float* x, float* sums) const;
  int64_t tokens() const { return tokens_; }
  int64_t cols() const { return cols_; }
  int group() const { return group_; }
  int64_t nbytes() const { return planes_.nbytes() + f32_sums_.nbytes(); }

 private:
  PlaneBuffer planes_;
  GrowOnly<float> f32_sums_;
  PlaneRows rows_;
  const float* x_ = nullptr;
  int64_t tokens_ = 0, cols_ = 0;
  int group_ = 0;
  bool int8_ = false;
};

// Shape of one feed-forward record (docs/format.md): gate and up tiles alternating, then down.
struct FfnLayout {
  int64_t hidden = 0;
  int64_t intermediate = 0;
  TileMatrix gate_up;  // tiles = null; groups, strides and codec only
  TileMatrix down;
  int64_t down_offset = 0;
  float glu_alpha = 0.0f, glu_limit = 0.0f;  // of the kernels' Glu
  bool biased =
      false;  // float biases of gate, up and down follow down's tiles, each padded to whole row tiles

  int64_t bias_offset() const { return down_offset + down.row_tiles() * down.groups * down.tile_stride; }
  const float* biases(const uint8_t* record, int64_t row_tiles) const {
    if (!biased) return nullptr;
    return reinterpret_cast<const float*>(record + bias_offset()) + row_tiles * kTileRows;
  }
  Glu glu(const uint8_t* record) const {
    return {glu_alpha, glu_limit, biases(record, 0), biases(record, gate_up.row_tiles())};
  }
  const float* down_bias(const uint8_t* record) const { return biases(record, 2 * gate_up.row_tiles()); }

  // Columns of down: intermediate rounded up to its group.
  int64_t padded_intermediate() const { return down.groups * down.group; }
};

// Work of one expert: its record and the (token, result row) pairs it serves.
struct ExpertJob {
  const FfnLayout* layout = nullptr;
  const TokenInput* input = nullptr;
  const uint8_t* record = nullptr;
  int64_t first = 0;  // into the pair arrays
  int64_t count = 0;
  bool precise = false;  // low planes count everywhere
};

// A layer of experts that are all in memory, and what its router chose.
struct RoutedFfn {
  const TokenInput* input = nullptr;
  const FfnLayout* layout = nullptr;
  std::span<const uint64_t> addresses;  // of the records; 0: not in memory
  const int32_t* chosen = nullptr;      // [tokens, experts_per_token]
  const float* weights = nullptr;       // as chosen
  int64_t experts_per_token = 0;
  int64_t most_pairs = 0;                 // computed together; more of them need more scratch memory
  const ExpertJob* shared = nullptr;      // a block of every token (its input, layout and record), or null
  const float* shared_weights = nullptr;  // [tokens]
};

constexpr size_t kMaxLinearWeights = 8;  // of one linear call

// The last tasks of a product read about this much weight data: large against the microsecond a hand-over
// costs, small enough to level out the end.
constexpr int64_t kTaskNbytes = 32 * 1024;

// Not thread-safe: one QuantOps per inference thread; it may share the pool with other op objects.
class QuantOps {
 public:
  QuantOps(ThreadPool& pool, Isa isa, bool int8);
  ~QuantOps();
  QuantOps(const QuantOps&) = delete;
  QuantOps& operator=(const QuantOps&) = delete;

  void prepare(TokenInput& input, const float* x, int64_t tokens, int64_t cols, int group);

  // outs[i][t, r] = sum_c W_i[r, c] x[t, c]; x: [tokens, cols].  precise: see TokenInput; gated: x are
  // products of values and their gates.
  void linear(const float* x, int64_t tokens, int64_t cols, std::span<const Matrix> weights,
              std::span<float* const> outs, bool precise, bool gated = false);

  // out[t, r] = sum_c W[r, c] x[t, c], low planes as in linear; then once more, with low planes everywhere,
  // the rows of each token's kSureTiles row tiles with the largest results.
  void logits(const float* x, int64_t tokens, int64_t cols, const Matrix& weight, float* out);

  // out[t, h, r] = sum_c W_h[r, c] x[t, h, c] for heads of W = [heads * rows, cols] one after another;
  // x_width and out_width are floats from head to head.  rows of a tile matrix: a multiple of 16.
  void head_linear(const float* x, int64_t tokens, int64_t heads, int64_t x_width, const Matrix& weight,
                   float* out, int64_t out_width, bool precise);

  // out[t, :] = row ids[t] of the table.  Ids must be in range.
  void embed(const Matrix& table, std::span<const int32_t> ids, float* out);

  // For every job and pair p: y = ffn(record, x[tokens[p]]).
  // weights empty: out[rows[p], :] = y;  else out[rows[p], :] = fma(weights[p], y, out[rows[p], :]), jobs in
  // the order given.
  void expert_ffn(std::span<const ExpertJob> jobs, std::span<const int32_t> tokens,
                  std::span<const int32_t> rows, std::span<const float> weights, float* out);

  // As expert_ffn with weights: the shared block, then the chosen experts by ascending number.  Returns how
  // many experts that were.  Throws std::invalid_argument, before anything is computed, when one is not in
  // memory.
  int64_t routed_ffn(const RoutedFfn& call, float* out);

  // out[rows[p], :] = fma(weights[p], y[p, :], out[rows[p], :]) for p ascending.
  void combine(const float* y, int64_t cols, std::span<const int32_t> rows, std::span<const float> weights,
               float* out);

  void sigmoid(const float* x, int64_t n, float* out) { kernels_.sigmoid(x, n, out); }

  // Bytes per second of all threads reading `nbytes` (a multiple of 64) once; best of three passes.
  double read_bandwidth(const uint8_t* data, int64_t nbytes);

  // Integer multiply-adds per second of all threads together between registers; best of three passes.
  double int8_peak();

  int64_t scratch_nbytes() const;

 private:
  struct Job;

  // x.group is each matrix's; x.every at least where precise.
  void multiply(FloatRows x, int64_t tokens, std::span<const Matrix> weights, std::span<float* const> outs,
                bool precise);
  void multiply_rows(const Matrix& matrix, const float* x, int64_t tokens, bool precise, int64_t tile_begin,
                     int64_t tile_end, float* out);
  void lay_out(std::span<const ExpertJob> jobs, std::span<const int32_t> tokens);
  void gather(Job& job, std::span<const int32_t> tokens);
  void run_up(Job& job, int64_t tile_begin, int64_t tile_end, const uint8_t* after);
  void run_down(const Job& job, int64_t tile_begin, int64_t tile_end, const uint8_t* after,
                const int32_t* rows, const float* weights, float* out);
  int64_t group_pairs(const RoutedFfn& call);
  void down_each(const int32_t* rows, float* out);
  void down_summed(const int32_t* rows, const float* weights, float* out);
  Activations hidden_view(const Job& job);

  ThreadPool& pool_;
  const QuantKernels& kernels_;
  bool int8_;
  TokenInput linear_input_[2];  // groups of 32 and of 64
  PlaneBuffer head_planes_;
  GrowOnly<float> head_rows_;
  GrowOnly<float> hidden_;
  PlaneBuffer hidden_planes_;
  PlaneBuffer gathered_planes_;
  GrowOnly<float> gathered_;
  GrowOnly<float> hidden_sums_;
  GrowOnly<float> apart_;
  struct {
    std::vector<int64_t> starts;  // of each expert's pairs
    std::vector<int32_t> tokens;
    std::vector<float> weights;
    std::vector<ExpertJob> jobs;
  } routed_;
  std::vector<Job> jobs_;
  std::vector<WorkRun> runs_;
  WorkSplit split_;
};

}  // namespace flashmoe
