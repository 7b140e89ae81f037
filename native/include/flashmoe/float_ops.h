// Float operations of a decoder over the kernel table, split over a thread pool.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "flashmoe/float_kernels.h"
#include "flashmoe/quant_ops.h"
#include "flashmoe/thread_pool.h"

namespace flashmoe {

// Tokens of a prompt whose keys and queries are prepared at a time: 4 MiB at the 35B shape.
constexpr int64_t kDeltaTokens = 256;

// Rows [begin, end) of a call go on with one sequence, whose state they advance.
struct SequenceRows {
  float* state = nullptr;
  int64_t begin = 0, end = 0;
};

struct DeltaShape {
  int64_t tokens = 0, key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0;
  int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

// Arrays of a gated_delta_rule (kernels/ops.py).
struct DeltaCall {
  const float* mixed = nullptr;  // [tokens, channels]: queries, keys, values
  const float* a = nullptr;      // [tokens, value_heads], as b
  const float* b = nullptr;
  const float* a_log = nullptr;  // [value_heads], as dt_bias
  const float* dt_bias = nullptr;
  float* out = nullptr;  // [tokens, value_heads, value_dim]
};

struct AttentionShape {
  int64_t tokens = 0, heads = 0, kv_heads = 0, head_dim = 0, rotated = 0;
  bool gated = true;   // a query's head_dim values are followed by as many of its gate
  int64_t window = 0;  // keys that a token sees, itself included; 0: all
};

struct LatentShape {
  int64_t tokens = 0, heads = 0, nope = 0, rotated = 0, rank = 0;
  int64_t width() const { return rank + rotated; }  // of a cached position, and of an absorbed query
};

// How a sigmoid router picks: the k best of the topk_groups best of `groups` equal groups.
struct GroupedRouting {
  int64_t experts = 0, k = 0, groups = 1, topk_groups = 1;
  bool normalise = true;
  float scale = 1.0f;
};

// Not thread-safe: one FloatOps per inference thread; it may share the pool with other op objects.
class FloatOps {
 public:
  FloatOps(ThreadPool& pool, Isa isa) : pool_(pool), kernels_(float_kernels(isa)) {}

  void rms_norm(const float* x, const float* w, int64_t rows, int64_t n, float eps, float* out);
  void add_rms_norm(float* x, const float* delta, const float* w, int64_t rows, int64_t n, float eps,
                    float* out);
  // rows of n values: one norm each.
  void gated_rms_norm(const float* o, const float* z, const float* w, int64_t rows, int64_t n, float eps,
                      float* out);
  // w: [taps, channels].  Sequences' rows follow one another; no state serves two of them, here and below.
  void causal_conv1d(const float* u, const float* w, std::span<const SequenceRows> sequences,
                     int64_t channels, int64_t taps, float* out);
  void gated_delta_rule(const DeltaShape& shape, const DeltaCall& call,
                        std::span<const SequenceRows> sequences);
  // q_norm, k_norm: null for none.
  void attention_prepare(const AttentionShape& shape, const float* q_gate, const float* k, const float* v,
                         const float* q_norm, const float* k_norm, float eps, const float* cos,
                         const float* sin, int64_t position, float* q_out, const CacheView& keys,
                         const CacheView& values);
  // q_gate, sinks [heads]: null for none.
  void attention(const AttentionShape& shape, const float* q, const CacheView& keys, const CacheView& values,
                 int64_t position, const float* q_gate, float* out, const float* sinks = nullptr);
  // Rotated parts of the queries to q_out [tokens, heads, width], latents and their rotated part to the
  // cache.
  void mla_prepare(const LatentShape& shape, const float* q, const float* latents, const float* norm,
                   float eps, const float* cos, const float* sin, bool interleaved, int64_t position,
                   float* q_out, const CacheView& cache);
  // q: [tokens, heads, width]; out: [tokens, heads, rank].
  void mla_attention(const LatentShape& shape, const float* q, const CacheView& cache, int64_t position,
                     float scale, float* out);
  // Returns false when a logit is not a number.
  bool route(const float* logits, int64_t tokens, int64_t experts, int64_t k, bool renormalise,
             int32_t* chosen, float* weights);
  bool route_grouped(const GroupedRouting& routing, const float* logits, const float* bias, int64_t tokens,
                     int32_t* chosen, float* weights);

  int64_t scratch_nbytes() const { return scratch_.nbytes(); }

 private:
  // At most kDeltaTokens, the rows of `sequences` counted from the first of mixed.
  void delta_part(const DeltaCall& call, const DeltaShape& shape, std::span<const SequenceRows> sequences);

  ThreadPool& pool_;
  const FloatKernels& kernels_;
  GrowOnly<float> scratch_;
};

}  // namespace flashmoe
