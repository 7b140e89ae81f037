// The 16-lane vector as one AVX-512 register.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "flashmoe/target.h"

FLASHMOE_TARGET_BEGIN_AVX512
namespace flashmoe::avx512 {

struct F32x16 {
  __m512 v;
};

FLASHMOE_INLINE __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

FLASHMOE_INLINE F32x16 set1(float a) { return {_mm512_set1_ps(a)}; }
FLASHMOE_INLINE F32x16 zero() { return {_mm512_setzero_ps()}; }
FLASHMOE_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
FLASHMOE_INLINE void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
FLASHMOE_INLINE F32x16 load_n(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
FLASHMOE_INLINE void store_n(float* p, F32x16 a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
FLASHMOE_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
FLASHMOE_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FLASHMOE_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FLASHMOE_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
FLASHMOE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FLASHMOE_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
FLASHMOE_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
FLASHMOE_INLINE F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
FLASHMOE_INLINE F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
FLASHMOE_INLINE F32x16 round_even(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FLASHMOE_INLINE F32x16 exp2_integer(F32x16 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
FLASHMOE_INLINE F32x16 zero_where_below(F32x16 a, F32x16 x, float limit) {
  // Not-less-than, unordered is true: a NaN stays a NaN.
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.v)};
}
// Lane i: bit i of bits ? a : b.
FLASHMOE_INLINE F32x16 select_lanes(uint32_t bits, F32x16 a, F32x16 b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)};
}
FLASHMOE_INLINE __m256i load_halves(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
FLASHMOE_INLINE F32x16 load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p)), 16))};
}
FLASHMOE_INLINE F32x16 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(load_halves(p))}; }
FLASHMOE_INLINE F32x16 load_i8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
FLASHMOE_INLINE void store_f16(uint16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// Lanes i and i + 8, then + 4, + 2, + 1: the tree of every instruction set.
FLASHMOE_INLINE float reduce_add(F32x16 a) {
  const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}
FLASHMOE_INLINE float reduce_max(F32x16 a) {
  const __m256 by8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 by4 = _mm_max_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_max_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_max_ss(by2, _mm_movehdup_ps(by2)));
}

#include "flashmoe/simd/common-inl.h"

}  // namespace flashmoe::avx512
FLASHMOE_TARGET_END
