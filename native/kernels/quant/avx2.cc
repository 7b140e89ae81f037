#include "flashmoe/quant_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "flashmoe/simd/avx2.h"
#include "flashmoe/target.h"

FLASHMOE_TARGET_BEGIN_AVX2
namespace flashmoe::avx2 {
namespace {

#include "kernels/quant/avx2-inl.h"

// vpmaddubsw sums two products in 16 bits: 2 * 127 * 127 = 32,258 fits, so codes must stay below 128.
FLASHMOE_INLINE I32x16 dot4(I32x16 acc, U8x64 codes, int32_t x4) {
  const __m256i x = _mm256_set1_epi32(x4), ones = _mm256_set1_epi16(1);
  for (int h = 0; h < 2; ++h) {
    const __m256i pairs = _mm256_maddubs_epi16(codes.half[h], x);
    acc.half[h] = _mm256_add_epi32(acc.half[h], _mm256_madd_epi16(pairs, ones));
  }
  return acc;
}
// 8-bit codes: the low and the high nibble separately, because 2 * 255 * 127 would saturate.
FLASHMOE_INLINE I32x16 dot4_wide(I32x16 acc, U8x64 codes, int32_t x4) {
  const I32x16 low = dot4(i32_zero(), u8_and(codes, 0x0f), x4);
  const I32x16 high = dot4(i32_zero(), u8_and(u8_shr(codes, 4), 0x0f), x4);
  for (int h = 0; h < 2; ++h) {
    const __m256i sum = _mm256_add_epi32(low.half[h], _mm256_slli_epi32(high.half[h], 4));
    acc.half[h] = _mm256_add_epi32(acc.half[h], sum);
  }
  return acc;
}
}  // namespace

#include "kernels/quant/quant-inl.h"

}  // namespace flashmoe::avx2
FLASHMOE_TARGET_END

namespace flashmoe {
const QuantKernels& quant_kernels_avx2() { return avx2::kTable; }
}  // namespace flashmoe
#endif
