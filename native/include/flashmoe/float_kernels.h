// Float kernels of one instruction set: norms, convolution, recurrence, attention.
//
// Each function is one task's work: pure, no allocation.  All instruction sets perform the same operations on
// the same 16 lanes and give the same bits; a token's result does not depend on how many tokens share a call.
#pragma once

#include <cstdint>

#include "flashmoe/cpu.h"

namespace flashmoe {

constexpr int64_t kMaxHeadDim = 512;      // head_dim, key_dim and value_dim limits of the stack buffers below
constexpr int64_t kMaxLatent = 640;       // the same of a latent with its rotated part (576 in DeepSeek-V3)
constexpr int64_t kLatentHeads = 32;      // query heads that share one pass over latents, one a lane
constexpr int64_t kLatentSpan = 2048;     // keys whose sums are kept apart from those of other spans
constexpr int64_t kKeyBlock = 256;        // keys of one online-softmax step, aligned to absolute positions
constexpr int64_t kHeadsPerTask = 8;      // query heads that share one pass over keys and values
constexpr int64_t kCachePositions = 16;   // positions of one block of the cache: the lanes of a vector
constexpr int64_t kCacheScaleGroup = 64;  // values of an int8 cache that share a scale

enum class CacheType { f32, f16, int8 };

// Keys or values of one layer, [kv_heads, blocks of 16 positions, block].  A block of keys is [head_dim, 16],
// so that a vector holds one value of 16 keys and scores need no sum over lanes; a block of values is [16,
// padded head_dim].  An int8 block goes on with its float scales, [groups of 64, 16].
struct CacheView {
  uint8_t* data = nullptr;
  CacheType type = CacheType::f16;
  int64_t blocks = 0;
  int64_t head_dim = 0;

  static constexpr int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
  static constexpr int64_t groups(int64_t head_dim) {
    return (head_dim + kCacheScaleGroup - 1) / kCacheScaleGroup;
  }
  int64_t element_nbytes() const { return type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1; }
  int64_t codes_nbytes() const { return kCachePositions * padded(head_dim) * element_nbytes(); }
  int64_t block_nbytes() const {
    return codes_nbytes() + (type == CacheType::int8 ? 4 * kCachePositions * groups(head_dim) : 0);
  }
  int64_t context() const { return blocks * kCachePositions; }
  // The block of a position.
  uint8_t* block(int64_t kv_head, int64_t position) const {
    return data + (kv_head * blocks + position / kCachePositions) * block_nbytes();
  }
};

// out = silu(sum_j w[j, c] * u[t - taps + 1 + j, c]) for some tokens and channels.
struct ConvTask {
  const float* u = nullptr;      // [tokens of the call, channels]
  const float* w = nullptr;      // [taps, channels]
  const float* state = nullptr;  // [taps - 1, channels]: the rows before u
  float* out = nullptr;          // like u
  int64_t channels = 0, taps = 0;
  int64_t first_token = 0, end_token = 0;
  int64_t first_channel = 0, end_channel = 0;
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
  float* state = nullptr;        // [key_dim, value_dim]
  const float* after = nullptr;  // the state that the thread goes on with, asked for in time; or null
  float* out = nullptr;          // [value_dim]
  int64_t out_stride = 0;
  int64_t tokens = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
};

// What attention over some of the keys has found: values weighted by exp(score - max), and the weights' sum.
struct AttentionPart {
  float* max = nullptr;  // [heads]
  float* sum = nullptr;  // [heads]
  float* acc = nullptr;  // heads are `stride` floats apart
  int64_t stride = 0;
};

struct Fetch {
  const void* at = nullptr;
  int64_t nbytes = 0;
};

struct AttentionTask {
  const float* q = nullptr;  // [heads, head_dim] of one token
  CacheView keys, values;
  int64_t kv_head = 0;
  int64_t heads = 0;  // at most kHeadsPerTask
  int64_t first = 0;  // a multiple of kCachePositions
  int64_t count = 0;  // keys first .. first + count - 1, all of one kKeyBlock
  int64_t skip = 0;   // of them before the window, below kCachePositions: they weigh nothing
  float scale = 0.0f;
  Fetch with_scores;  // memory that is wanted next
  Fetch with_values;  // and after that
};

// What latent attention has found so far: lanes are heads, vectors of kLatentHeads floats.
struct LatentPart {
  float* max = nullptr;  // [kLatentHeads]
  float* sum = nullptr;  // [kLatentHeads]
  float* acc = nullptr;  // [rank, kLatentHeads]

  static constexpr int64_t floats(int64_t rank) { return (rank + 2) * kLatentHeads; }
  static LatentPart at(float* memory) { return {memory, memory + kLatentHeads, memory + 2 * kLatentHeads}; }
};

// Latents lie as the values of one head do: rows of `head_dim` numbers, of which the first `rank` are the
// values.
struct LatentTask {
  const float* q = nullptr;  // [heads, head_dim] of one token
  CacheView latents;
  int64_t heads = 0;  // at most kLatentHeads
  int64_t rank = 0;
  int64_t first = 0;  // a multiple of kLatentSpan
  int64_t count = 0;  // keys first .. first + count - 1, at most kLatentSpan
  float scale = 0.0f;
};

struct FloatKernels {
  // out = x / sqrt(mean(x^2) + eps) * w
  void (*rms_norm)(const float* x, const float* w, int64_t n, float eps, float* out);
  // x += delta
  void (*add)(float* x, const float* delta, int64_t n);
  // out = o / sqrt(mean(o^2) + eps) * w * silu(z)
  void (*gated_rms_norm)(const float* o, const float* z, const float* w, int64_t n, float eps, float* out);
  void (*causal_conv)(const ConvTask& task);
  // out = x * factor / sqrt(sum(x^2) + 1e-6)
  void (*l2_norm)(const float* x, int64_t n, float factor, float* out);
  float (*dot)(const float* a, const float* b, int64_t n);
  void (*delta_head)(const DeltaStep& step);
  // Rotates x [dim] in place: pairs (i, i + half) by the angles of cos, sin [half].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);
  // Writes x [head_dim] as the key, or the value, of one position.
  void (*store_key)(const CacheView& cache, int64_t kv_head, int64_t position, const float* x);
  void (*store_value)(const CacheView& cache, int64_t kv_head, int64_t position, const float* x);
  // The part of one block of keys; part.stride is at least head_dim padded to 16.
  void (*attend)(const AttentionTask& task, const AttentionPart& part);
  // total += part.
  void (*merge_parts)(const AttentionPart& total, const AttentionPart& part, int64_t heads, int64_t dim);
  // acc / sum * sigmoid(gate) in place, 0 for gates below -80; gates of heads are 2 * dim apart, null: none.
  // sinks: a further score of each head whose value is zero; null: none.
  void (*finish_attention)(const AttentionPart& total, const float* gate, const float* sinks, int64_t heads,
                           int64_t dim);
  // The part of one span of latents.
  void (*attend_latents)(const LatentTask& task, const LatentPart& part);
  // total += part.
  void (*merge_latents)(const LatentPart& total, const LatentPart& part, int64_t rank);
  // out[h, i] = acc[i, h] / sum[h] for h < heads, i < rank.
  void (*finish_latents)(const LatentPart& total, int64_t heads, int64_t rank, float* out);
  // x[i] = exp(x[i] - largest) / sum; n <= 16 * 64
  void (*softmax)(float* x, int64_t n);
  // out[i] = 1 / (1 + exp(-x[i]))
  void (*sigmoid)(const float* x, int64_t n, float* out);
};

const FloatKernels& float_kernels_scalar();
const FloatKernels& float_kernels_avx2();
const FloatKernels& float_kernels_avx512vnni();
const FloatKernels& float_kernels_neon();

// Table of `isa`; throws std::invalid_argument when it is not compiled in.
const FloatKernels& float_kernels(Isa isa);

}  // namespace flashmoe
