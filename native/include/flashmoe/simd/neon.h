// The 16-lane vector as four NEON registers; every AArch64 processor has them.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "flashmoe/target.h"

namespace flashmoe::neon {

struct F32x16 {
  float32x4_t q[4];
};

#define FLASHMOE_QUARTERS(expression)                   \
  F32x16 result;                                        \
  FLASHMOE_UNROLL(4)                                    \
  for (int i = 0; i < 4; ++i) result.q[i] = expression; \
  return result

FLASHMOE_INLINE F32x16 set1(float a) { FLASHMOE_QUARTERS(vdupq_n_f32(a)); }
FLASHMOE_INLINE F32x16 zero() { return set1(0.0f); }
FLASHMOE_INLINE F32x16 load(const float* p) { FLASHMOE_QUARTERS(vld1q_f32(p + 4 * i)); }
FLASHMOE_INLINE void store(float* p, F32x16 a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.q[i]);
}
FLASHMOE_INLINE F32x16 load_n(const float* p, int64_t n) {
  if (n >= 16) return load(p);
  float padded[16] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
FLASHMOE_INLINE void store_n(float* p, F32x16 a, int64_t n) {
  if (n >= 16) return store(p, a);
  float padded[16];
  store(padded, a);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}
FLASHMOE_INLINE F32x16 add(F32x16 a, F32x16 b) { FLASHMOE_QUARTERS(vaddq_f32(a.q[i], b.q[i])); }
FLASHMOE_INLINE F32x16 sub(F32x16 a, F32x16 b) { FLASHMOE_QUARTERS(vsubq_f32(a.q[i], b.q[i])); }
FLASHMOE_INLINE F32x16 mul(F32x16 a, F32x16 b) { FLASHMOE_QUARTERS(vmulq_f32(a.q[i], b.q[i])); }
FLASHMOE_INLINE F32x16 div(F32x16 a, F32x16 b) { FLASHMOE_QUARTERS(vdivq_f32(a.q[i], b.q[i])); }
FLASHMOE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  FLASHMOE_QUARTERS(vfmaq_f32(c.q[i], a.q[i], b.q[i]));
}
// The second operand where one is NaN, as on x86; vmaxq would give the NaN.
FLASHMOE_INLINE float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
FLASHMOE_INLINE F32x16 max(F32x16 a, F32x16 b) { FLASHMOE_QUARTERS(larger(a.q[i], b.q[i])); }
FLASHMOE_INLINE F32x16 min(F32x16 a, F32x16 b) {
  FLASHMOE_QUARTERS(vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]));
}
FLASHMOE_INLINE F32x16 abs(F32x16 a) { FLASHMOE_QUARTERS(vabsq_f32(a.q[i])); }
FLASHMOE_INLINE F32x16 sqrt(F32x16 a) { FLASHMOE_QUARTERS(vsqrtq_f32(a.q[i])); }
FLASHMOE_INLINE F32x16 round_even(F32x16 a) { FLASHMOE_QUARTERS(vrndnq_f32(a.q[i])); }
FLASHMOE_INLINE F32x16 exp2_integer(F32x16 n) {
  FLASHMOE_QUARTERS(
      vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23)));
}
FLASHMOE_INLINE float32x4_t keep_bits(float32x4_t a, uint32x4_t mask) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), mask));
}
FLASHMOE_INLINE F32x16 zero_where_below(F32x16 a, F32x16 x, float limit) {
  // A NaN is not below: it stays a NaN.
  FLASHMOE_QUARTERS(keep_bits(a.q[i], vmvnq_u32(vcltq_f32(x.q[i], vdupq_n_f32(limit)))));
}
// Lane i: bit i of bits ? a : b.
FLASHMOE_INLINE F32x16 select_lanes(uint32_t bits, F32x16 a, F32x16 b) {
  const uint32_t powers[4] = {1, 2, 4, 8};
  const uint32x4_t lanes = vld1q_u32(powers);
  FLASHMOE_QUARTERS(vbslq_f32(vtstq_u32(vdupq_n_u32(bits >> (4 * i)), lanes), a.q[i], b.q[i]));
}
FLASHMOE_INLINE F32x16 load_bf16(const uint16_t* p) {
  FLASHMOE_QUARTERS(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
FLASHMOE_INLINE F32x16 load_f16(const uint16_t* p) {
  FLASHMOE_QUARTERS(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
FLASHMOE_INLINE void store_f16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.q[i])));
}
FLASHMOE_INLINE F32x16 load_i8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t halves[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))};
  FLASHMOE_QUARTERS(
      vcvtq_f32_s32(vmovl_s16(i % 2 == 0 ? vget_low_s16(halves[i / 2]) : vget_high_s16(halves[i / 2]))));
}

#undef FLASHMOE_QUARTERS

// Lanes i and i + 8, then + 4, + 2, + 1: the tree of every instruction set.
FLASHMOE_INLINE float reduce_add(F32x16 a) {
  const float32x4_t by4 = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t by2 = vadd_f32(vget_low_f32(by4), vget_high_f32(by4));
  return vget_lane_f32(by2, 0) + vget_lane_f32(by2, 1);
}
FLASHMOE_INLINE float reduce_max(F32x16 a) {
  const float32x4_t by4 = larger(larger(a.q[0], a.q[2]), larger(a.q[1], a.q[3]));
  float lane[4];
  vst1q_f32(lane, by4);
  const float first = lane[0] > lane[2] ? lane[0] : lane[2], second = lane[1] > lane[3] ? lane[1] : lane[3];
  return first > second ? first : second;
}

#include "flashmoe/simd/common-inl.h"

}  // namespace flashmoe::neon
