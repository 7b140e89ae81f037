#include "flashmoe/quant_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "flashmoe/simd/avx2.h"
#include "flashmoe/target.h"

FLASHMOE_TARGET_BEGIN_AVX2
namespace flashmoe::avx2 {
namespace {

constexpr int kTogether = 4;
constexpr bool kSpecialised = true;

struct U8x64 {
  __m256i half[2];  // rows 0-7, rows 8-15
};
struct I32x16 {
  __m256i half[2];
};

FLASHMOE_INLINE U8x64 u8_load(const uint8_t* p) {
  return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))}};
}
FLASHMOE_INLINE U8x64 u8_and(U8x64 v, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {{_mm256_and_si256(v.half[0], m), _mm256_and_si256(v.half[1], m)}};
}
FLASHMOE_INLINE U8x64 u8_shr(U8x64 v, int bits) {
  return {{_mm256_srli_epi32(v.half[0], bits), _mm256_srli_epi32(v.half[1], bits)}};
}
FLASHMOE_INLINE U8x64 u8_shl(U8x64 v, int bits) {
  return {{_mm256_slli_epi32(v.half[0], bits), _mm256_slli_epi32(v.half[1], bits)}};
}
FLASHMOE_INLINE U8x64 u8_or(U8x64 a, U8x64 b) {
  return {{_mm256_or_si256(a.half[0], b.half[0]), _mm256_or_si256(a.half[1], b.half[1])}};
}
FLASHMOE_INLINE I32x16 i32_zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
FLASHMOE_INLINE I32x16 i32_add(I32x16 a, I32x16 b) {
  return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}
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
FLASHMOE_INLINE F32x16 to_f32(I32x16 v) {
  return {_mm256_cvtepi32_ps(v.half[0]), _mm256_cvtepi32_ps(v.half[1])};
}
FLASHMOE_INLINE F32x16 byte_f32(U8x64 v, int byte) {
  const __m256i mask = _mm256_set1_epi32(0xff);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v.half[0], 8 * byte), mask)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v.half[1], 8 * byte), mask))};
}
FLASHMOE_INLINE F32x16 load_scales(const uint8_t* p, bool f16) {
  const uint16_t* raw = reinterpret_cast<const uint16_t*>(p);
  return f16 ? load_f16(raw) : load_bf16(raw);
}
FLASHMOE_INLINE I32x16 round_i32(F32x16 v) { return {{_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}}; }
FLASHMOE_INLINE void store_i8(int8_t* p, I32x16 v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.half[0], v.half[1]), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

}  // namespace

#include "kernels/quant/quant-inl.h"

}  // namespace flashmoe::avx2
FLASHMOE_TARGET_END

namespace flashmoe {
const QuantKernels& quant_kernels_avx2() { return avx2::kTable; }
}  // namespace flashmoe
#endif
