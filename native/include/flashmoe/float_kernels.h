// Float kernels of one instruction set: norms, convolution, recurrence, attention.
//
// Each function is one task's work: pure, no allocation.  All instruction sets perform the same operations on
// the same 16 lanes and give the same bits; a token's result does not depend on how many tokens share a call.
#pragma once

#include <cstdint>

#include "flashmoe/cpu.h"

namespace flashmoe {

constexpr int64_t kMaxHeadDim = 512;  // head_dim, key_dim and value_dim limits of the stack buffers below
constexpr int64_t kKeyBlock = 64;     // keys of one online-softmax step, aligned to absolute positions
constexpr int64_t kHeadsPerTask = 8;  // query heads that share one pass over keys and values
constexpr int64_t kQueryBlock = 8;    // tokens that share it in a prompt: a key block stays in the caches

struct CacheView {
  void* data = nullptr;  // [kv_heads, context, head_dim]
  bool f16 = true;
  int64_t context = 0;
  int64_t head_dim = 0;
};

struct DeltaStep {
  // Of one value head, for `tokens` tokens; strides are floats from token to token.
  const float* q = nullptr;  // normalised and scaled, [key_dim]
  const float* k = nullptr;  // normalised, [key_dim]
  int64_t qk_stride = 0;
  const float* kq = nullptr;  // k . q
  int64_t kq_stride = 0;
  const float* v = nullptr;  // [value_dim]
  int64_t v_stride = 0;
  const float* beta = nullptr;
  const float* decay = nullptr;  // exp(g)
  int64_t gate_stride = 0;
  float* state = nullptr;  // [key_dim, value_dim]
  float* out = nullptr;    // [value_dim]
  int64_t out_stride = 0;
  int64_t tokens = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
};

struct AttentionTask {
  // Of `tokens` neighbouring tokens; strides are floats from token to token.
  const float* q = nullptr;  // [heads, head_dim]
  int64_t q_stride = 0;
  const float* gate = nullptr;  // heads are 2 * head_dim apart
  int64_t gate_stride = 0;
  CacheView keys, values;
  int64_t kv_head = 0;
  int64_t heads = 0;    // at most kHeadsPerTask
  int64_t tokens = 1;   // at most kQueryBlock
  int64_t visible = 0;  // the first token sees keys 0 .. visible - 1, each further one sees one more
  float scale = 0.0f;
  float* out = nullptr;  // [heads, head_dim]
  int64_t out_stride = 0;
};

// The online softmax of one query row.
struct AttentionRow {
  float max;
  float sum;
};

struct FloatKernels {
  // out = x / sqrt(mean(x^2) + eps) * w
  void (*rms_norm)(const float* x, const float* w, int64_t n, float eps, float* out);
  // x += delta
  void (*add)(float* x, const float* delta, int64_t n);
  // out = o / sqrt(mean(o^2) + eps) * w * silu(z)
  void (*gated_rms_norm)(const float* o, const float* z, const float* w, int64_t n, float eps, float* out);
  // Channels [begin, end): out = silu(sum_j w[j, c] * u[t - K + 1 + j, c]); state [K-1, C] holds the rows
  // before u.
  void (*causal_conv)(const float* u, const float* w, float* state, int64_t tokens, int64_t channels,
                      int64_t taps, int64_t begin, int64_t end, float* out);
  // out = x * factor / sqrt(sum(x^2) + 1e-6)
  void (*l2_norm)(const float* x, int64_t n, float factor, float* out);
  float (*dot)(const float* a, const float* b, int64_t n);
  void (*delta_head)(const DeltaStep& step);
  // Rotates x [dim] in place: pairs (i, i + half) by the angles of cos, sin [half].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);
  // cache[kv_head, position, :] = x [head_dim]
  void (*store_cache)(const CacheView& cache, int64_t kv_head, int64_t position, const float* x);
  void (*attention)(const AttentionTask& task);
  // x[i] = exp(x[i] - largest) / sum; n <= 16 * 64
  void (*softmax)(float* x, int64_t n);
};

const FloatKernels& float_kernels_scalar();
const FloatKernels& float_kernels_avx2();
const FloatKernels& float_kernels_avx512vnni();
const FloatKernels& float_kernels_neon();

// Table of `isa`; throws std::invalid_argument when it is not compiled in.
const FloatKernels& float_kernels(Isa isa);

}  // namespace flashmoe
