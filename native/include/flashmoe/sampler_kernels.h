// Passes over a vocabulary of logits or weights, one table per instruction set.
//
// All functions are pure and give the same bits in every instruction set.
#pragma once

#include <cstdint>

#include "flashmoe/cpu.h"

namespace flashmoe {

constexpr int64_t kSampleBlock = 64;  // values of one maximum or sum: 3,880 blocks of 248,320 logits

struct SamplerKernels {
  // maxima[b] = largest of x[64 b, min(n, 64 b + 64)).  Returns false when a value is NaN or infinite, which
  // may be harmless: the maxima are right but for NaN.
  bool (*block_maxima)(const float* x, int64_t n, float* maxima);
  // out[i] = bit i of allowed ? x[i] : -infinity.
  void (*hide)(const float* x, const uint32_t* allowed, int64_t n, float* out);
  // w[i] = exp((x[i] - largest) * inverse).
  void (*weights)(const float* x, int64_t n, float largest, float inverse, float* w);
  // sums[b] = sum of w over block b.
  void (*block_sums)(const float* w, int64_t n, float* sums);
  // w[i] = 0 where w[i] < least, for i in [begin, end).
  void (*drop_below)(float* w, int64_t begin, int64_t end, float least);
  // Sum of w[i] >= least for i in [begin, end), in blocks of 64 from begin on.
  double (*mass_from)(const float* w, int64_t begin, int64_t end, float least);
};

const SamplerKernels& sampler_kernels_scalar();
const SamplerKernels& sampler_kernels_avx2();
const SamplerKernels& sampler_kernels_avx512vnni();
const SamplerKernels& sampler_kernels_neon();

// Table of `isa`; throws std::invalid_argument when it is not compiled in.
const SamplerKernels& sampler_kernels(Isa isa);

}  // namespace flashmoe
