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

void FloatOps::gated_delta_rule(const DeltaShape& shape, const float* mixed, const float* a, const float* b,
                                const float* a_log, const float* dt_bias,
                                std::span<const SequenceRows> sequences, float* out) {
  // Every head passes over its keys and queries once for 32 of its columns: they must stay in the caches.
  const auto part = [&](int64_t begin, int64_t end, std::span<const SequenceRows> rows) {
    DeltaShape of = shape;
    of.tokens = end - begin;
    delta_part(of, mixed + begin * shape.channels(), a + begin * shape.value_heads,
               b + begin * shape.value_heads, a_log, dt_bias, rows,
               out + begin * shape.value_heads * shape.value_dim);
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

void FloatOps::delta_part(const DeltaShape& shape, const float* mixed, const float* a, const float* b,
                          const float* a_log, const float* dt_bias, std::span<const SequenceRows> sequences,
                          float* out) {
  const int64_t keys = shape.key_heads * shape.key_dim, heads = shape.value_heads;
  float* q = scratch_.at_least(shape.tokens * (2 * keys + shape.key_heads + 2 * heads));
  float* k = q + shape.tokens * keys;
  float* kq = k + shape.tokens * keys;
  float* beta = kq + shape.tokens * shape.key_heads;
  float* decay = beta + shape.tokens * heads;
  const float q_scale = 1.0f / std::sqrt(static_cast<float>(shape.key_dim));
  pool_.parallel_for(shape.tokens, [&](int64_t t) {
    for (int64_t h = 0; h < shape.key_heads; ++h) {
      const int64_t at = t * keys + h * shape.key_dim;
      const float* row = mixed + t * shape.channels() + h * shape.key_dim;
      kernels_.l2_norm(row, shape.key_dim, q_scale, q + at);
      kernels_.l2_norm(row + keys, shape.key_dim, 1.0f, k + at);
      kq[t * shape.key_heads + h] = kernels_.dot(q + at, k + at, shape.key_dim);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const double g =
          -std::exp(static_cast<double>(a_log[h])) * softplus(double{a[t * heads + h]} + dt_bias[h]);
      beta[t * heads + h] = static_cast<float>(1.0 / (1.0 + std::exp(-double{b[t * heads + h]})));
      decay[t * heads + h] = static_cast<float>(std::exp(g));
    }
  });
  const int64_t ratio = heads / shape.key_heads;
  pool_.parallel_for(static_cast<int64_t>(sequences.size()) * heads, [&](int64_t task) {
    const SequenceRows& rows = sequences[static_cast<size_t>(task / heads)];
    if (rows.begin == rows.end) return;
    const int64_t h = task % heads, key_head = h / ratio, first = rows.begin;
    DeltaStep step;
    step.q = q + first * keys + key_head * shape.key_dim;
    step.k = k + first * keys + key_head * shape.key_dim;
    step.qk_stride = keys;
    step.kq = kq + first * shape.key_heads + key_head;
    step.kq_stride = shape.key_heads;
    step.v = mixed + first * shape.channels() + 2 * keys + h * shape.value_dim;
    step.v_stride = shape.channels();
    step.beta = beta + first * heads + h;
    step.decay = decay + first * heads + h;
    step.gate_stride = heads;
    step.state = rows.state + h * shape.key_dim * shape.value_dim;
    step.out = out + (first * heads + h) * shape.value_dim;
    step.out_stride = heads * shape.value_dim;
    step.tokens = rows.end - rows.begin;
    step.key_dim = shape.key_dim;
    step.value_dim = shape.value_dim;
    kernels_.delta_head(step);
  });
}

}  // namespace flashmoe
