#include "flashmoe/quant_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "flashmoe/simd/avx2.h"
#include "flashmoe/target.h"

// The same as avxvnni.cc in the encoding of AVX-512: how the level avxvnni runs on processors that have that
// only.
FLASHMOE_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
namespace flashmoe::avx512vl {
namespace {

using namespace flashmoe::avx2;

#include "kernels/quant/avx2-inl.h"

// Does not saturate: 8-bit codes need no special care.
#define FLASHMOE_WIDE_CODES
FLASHMOE_INLINE I32x16 dot4(I32x16 acc, U8x64 codes, int32_t x4) {
  const __m256i x = _mm256_set1_epi32(x4);
  return {{_mm256_dpbusd_epi32(acc.half[0], codes.half[0], x),
           _mm256_dpbusd_epi32(acc.half[1], codes.half[1], x)}};
}
FLASHMOE_INLINE I32x16 dot4_wide(I32x16 acc, U8x64 codes, int32_t x4) { return dot4(acc, codes, x4); }

}  // namespace

#include "kernels/quant/quant-inl.h"

}  // namespace flashmoe::avx512vl
FLASHMOE_TARGET_END

namespace flashmoe {
const QuantKernels& quant_kernels_avx512vl() { return avx512vl::kTable; }
}  // namespace flashmoe
#endif
