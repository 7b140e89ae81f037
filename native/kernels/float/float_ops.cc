#include "flashmoe/float_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "flashmoe/work_split.h"

namespace flashmoe {
namespace {

// log(1 + e^x) without overflow; double, because its argument feeds an exponential of an exponential.
double softplus(double x) { return x > 30.0 ? x : std::log1p(std::exp(x)); }

// Rows small enough that several belong in one task.
int64_t rows_per_task(int64_t n) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(n, 1)); }

// Some channels of a sequence's state become the last rows of (state, u).  Few tokens leave rows of the old
// one, which move up.
void move_up(const SequenceRows& rows, const float* u, int64_t channels, int64_t past, int64_t first,
             int64_t end) {
  const int64_t tokens = rows.end - rows.begin, kept = std::max<int64_t>(past - tokens, 0);
  const size_t nbytes = static_cast<size_t>(end - first) * sizeof(float);
  for (int64_t r = 0; r < past; ++r) {
    float* to = rows.state + r * channels + first;
    const float* from = r < kept ? rows.state + (r + past - kept) * channels + first
                                 : u + (rows.end - past + r) * channels + first;
    if (to != from) std::memcpy(to, from, nbytes);
  }
}

// Of one key head and a sequence's tokens: normalised queries and keys [tokens, key_dim], their products
// [tokens], and the gates [tokens, heads] of its value heads.
struct DeltaInputs {
  float* q;
  float* k;
  float* kq = nullptr;
  float* beta = nullptr;
  float* decay = nullptr;
};

// For value heads [head, head + count), which share a key head.
void prepare_delta(const FloatKernels& kernels, const DeltaCall& call, const DeltaShape& shape,
                   const SequenceRows& rows, int64_t head, int64_t count, const DeltaInputs& to) {
  const int64_t dim = shape.key_dim, heads = shape.value_heads, ratio = heads / shape.key_heads;
  const float q_scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int64_t t = 0; t < rows.end - rows.begin; ++t) {
    const float* row = call.mixed + (rows.begin + t) * shape.channels() + head / ratio * dim;
    float *q = to.q + t * dim, *k = to.k + t * dim;
    kernels.l2_norm(row, dim, q_scale, q);
    kernels.l2_norm(row + shape.key_heads * dim, dim, 1.0f, k);
    to.kq[t] = kernels.dot(q, k, dim);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t h = head + i, at = (rows.begin + t) * heads + h;
      const double g =
          -std::exp(static_cast<double>(call.a_log[h])) * softplus(double{call.a[at]} + call.dt_bias[h]);
      to.beta[t * count + i] = static_cast<float>(1.0 / (1.0 + std::exp(-double{call.b[at]})));
      to.decay[t * count + i] = static_cast<float>(std::exp(g));
    }
  }
}

// Value head h of a sequence, without what prepare_delta makes.
DeltaStep delta_step(const DeltaCall& call, const DeltaShape& shape, const SequenceRows& rows, int64_t h) {
  DeltaStep step;
  step.qk_stride = shape.key_dim;
  step.kq_stride = 1;
  step.v =
      call.mixed + rows.begin * shape.channels() + 2 * shape.key_heads * shape.key_dim + h * shape.value_dim;
  step.v_stride = shape.channels();
  step.state = rows.state + h * shape.key_dim * shape.value_dim;
  step.after = h + 1 < shape.value_heads ? step.state + shape.key_dim * shape.value_dim : nullptr;
  step.out = call.out + (rows.begin * shape.value_heads + h) * shape.value_dim;
  step.out_stride = shape.value_heads * shape.value_dim;
  step.tokens = rows.end - rows.begin;
  step.key_dim = shape.key_dim;
  step.value_dim = shape.value_dim;
  return step;
}

}  // namespace

const FloatKernels& float_kernels(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return float_kernels_scalar();
#if defined(__x86_64__)
    case Isa::avx2:
    case Isa::avxvnni:
      return float_kernels_avx2();
    case Isa::avx512vnni:
      return float_kernels_avx512vnni();
#elif defined(__aarch64__)
    case Isa::neon:
    case Isa::dotprod:
    case Isa::i8mm:
      return float_kernels_neon();
#endif
    default:
      throw std::invalid_argument(std::string("no kernels for ") + isa_name(isa) + " in this build");
  }
}

void FloatOps::rms_norm(const float* x, const float* w, int64_t rows, int64_t n, float eps, float* out) {
  pool_.parallel_for(rows, [&](int64_t r) { kernels_.rms_norm(x + r * n, w, n, eps, out + r * n); });
}

void FloatOps::add_rms_norm(float* x, const float* delta, const float* w, int64_t rows, int64_t n, float eps,
                            float* out) {
  pool_.parallel_for(rows, [&](int64_t r) {
    kernels_.add(x + r * n, delta + r * n, n);
    kernels_.rms_norm(x + r * n, w, n, eps, out + r * n);
  });
}

void FloatOps::gated_rms_norm(const float* o, const float* z, const float* w, int64_t rows, int64_t n,
                              float eps, float* out) {
  const int64_t step = rows_per_task(n);
  pool_.parallel_for((rows + step - 1) / step, [&](int64_t task) {
    for (int64_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) {
      kernels_.gated_rms_norm(o + r * n, z + r * n, w, n, eps, out + r * n);
    }
  });
}

void FloatOps::causal_conv1d(const float* u, const float* w, std::span<const SequenceRows> sequences,
                             int64_t channels, int64_t taps, float* out) {
  constexpr int64_t kTokens = 16, kChannels = 2048;
  const int64_t columns = tasks_of(channels, kChannels), past = taps - 1;
  // Rows [begin, end) of a sequence, some columns.
  const auto convolve = [&](const SequenceRows& rows, int64_t begin, int64_t end, int64_t column) {
    const int64_t first = column * kChannels, at = rows.begin * channels;
    kernels_.causal_conv({u + at, w, rows.state, out + at, channels, taps, begin - rows.begin,
                          end - rows.begin, first, std::min(first + kChannels, channels)});
  };
  const auto is_short = [](const SequenceRows& rows) { return rows.end - rows.begin <= kTokens; };
  if (std::all_of(sequences.begin(), sequences.end(), is_short)) {
    // One region for all of them; whoever has used some columns of a state moves them up.
    pool_.parallel_for(static_cast<int64_t>(sequences.size()) * columns, [&](int64_t task) {
      const SequenceRows& rows = sequences[static_cast<size_t>(task / columns)];
      const int64_t column = task % columns, first = column * kChannels;
      convolve(rows, rows.begin, rows.end, column);
      move_up(rows, u, channels, past, first, std::min(first + kChannels, channels));
    });
    return;
  }
  for (const SequenceRows& rows : sequences) {
    pool_.parallel_for(tasks_of(rows.end - rows.begin, kTokens) * columns, [&](int64_t task) {
      const int64_t begin = rows.begin + task / columns * kTokens;
      convolve(rows, begin, std::min(begin + kTokens, rows.end), task % columns);
    });
    move_up(rows, u, channels, past, 0, channels);
  }
}

void FloatOps::gated_delta_rule(const DeltaShape& shape, const DeltaCall& call,
                                std::span<const SequenceRows> sequences) {
  // Every head passes over its keys and queries once for 32 of its columns: they must stay in the caches.
  const auto part = [&](int64_t begin, int64_t end, std::span<const SequenceRows> rows) {
    DeltaShape of = shape;
    of.tokens = end - begin;
    DeltaCall from = call;
    from.mixed += begin * shape.channels();
    from.a += begin * shape.value_heads;
    from.b += begin * shape.value_heads;
    from.out += begin * shape.value_heads * shape.value_dim;
    delta_part(from, of, rows);
  };
  if (shape.tokens <= kDeltaTokens) return part(0, shape.tokens, sequences);
  for (const SequenceRows& rows : sequences) {
    for (int64_t begin = rows.begin; begin < rows.end; begin += kDeltaTokens) {
      const int64_t end = std::min(begin + kDeltaTokens, rows.end);
      const SequenceRows own{rows.state, 0, end - begin};
      part(begin, end, {&own, 1});
    }
  }
}

void FloatOps::delta_part(const DeltaCall& call, const DeltaShape& shape,
                          std::span<const SequenceRows> sequences) {
  const int64_t ratio = shape.value_heads / shape.key_heads;
  const int64_t all = static_cast<int64_t>(sequences.size());
  // A key's value heads share its preparation, unless threads would have nothing to do.
  const int64_t together = all * shape.key_heads >= pool_.threads() ? ratio : 1;
  const int64_t parts = shape.value_heads / together;
  // Whole cache lines a token, so that no two tasks write to the same one.
  const int64_t width = tasks_of(2 * shape.key_dim + 1 + 2 * together, 16) * 16;
  float* scratch = scratch_.at_least(shape.tokens * parts * width);
  pool_.parallel_for(all * parts, [&](int64_t task) {
    // Neighbouring heads on one thread: what it has just convolved, and a state that lies in one piece.
    const int64_t item = neighbour(task, all * parts, pool_.threads());
    const SequenceRows& rows = sequences[static_cast<size_t>(item / parts)];
    const int64_t tokens = rows.end - rows.begin, head = item % parts * together;
    if (tokens == 0) return;
    float* at = scratch + (rows.begin * parts + item % parts * tokens) * width;
    DeltaInputs inputs{at, at + tokens * shape.key_dim};
    inputs.kq = inputs.k + tokens * shape.key_dim;
    inputs.beta = inputs.kq + tokens;
    inputs.decay = inputs.beta + tokens * together;
    prepare_delta(kernels_, call, shape, rows, head, together, inputs);
    for (int64_t h = head; h < head + together; ++h) {
      DeltaStep step = delta_step(call, shape, rows, h);
      step.q = inputs.q;
      step.k = inputs.k;
      step.kq = inputs.kq;
      step.beta = inputs.beta + (h - head);
      step.decay = inputs.decay + (h - head);
      step.gate_stride = together;
      kernels_.delta_head(step);
    }
  });
}

}  // namespace flashmoe
