// The definition of the 16-lane vector, lane by lane in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "flashmoe/target.h"

namespace flashmoe::scalar {

struct F32x16 {
  float v[16];
};

#define FLASHMOE_LANES(expression)                      \
  F32x16 out;                                           \
  for (int i = 0; i < 16; ++i) out.v[i] = (expression); \
  return out

FLASHMOE_INLINE F32x16 set1(float a) { FLASHMOE_LANES(a); }
FLASHMOE_INLINE F32x16 zero() { return set1(0.0f); }
FLASHMOE_INLINE F32x16 load(const float* p) { FLASHMOE_LANES(p[i]); }
FLASHMOE_INLINE void store(float* p, F32x16 a) { std::memcpy(p, a.v, sizeof a.v); }
FLASHMOE_INLINE F32x16 load_n(const float* p, int64_t n) { FLASHMOE_LANES(i < n ? p[i] : 0.0f); }
FLASHMOE_INLINE void store_n(float* p, F32x16 a, int64_t n) {
  for (int i = 0; i < 16 && i < n; ++i) p[i] = a.v[i];
}
FLASHMOE_INLINE F32x16 add(F32x16 a, F32x16 b) { FLASHMOE_LANES(a.v[i] + b.v[i]); }
FLASHMOE_INLINE F32x16 sub(F32x16 a, F32x16 b) { FLASHMOE_LANES(a.v[i] - b.v[i]); }
FLASHMOE_INLINE F32x16 mul(F32x16 a, F32x16 b) { FLASHMOE_LANES(a.v[i] * b.v[i]); }
FLASHMOE_INLINE F32x16 div(F32x16 a, F32x16 b) { FLASHMOE_LANES(a.v[i] / b.v[i]); }
FLASHMOE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { FLASHMOE_LANES(std::fma(a.v[i], b.v[i], c.v[i])); }
// As the hardware does: the second operand where the comparison is false (NaN).
FLASHMOE_INLINE F32x16 max(F32x16 a, F32x16 b) { FLASHMOE_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
FLASHMOE_INLINE F32x16 min(F32x16 a, F32x16 b) { FLASHMOE_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
FLASHMOE_INLINE F32x16 abs(F32x16 a) { FLASHMOE_LANES(std::fabs(a.v[i])); }
FLASHMOE_INLINE F32x16 sqrt(F32x16 a) { FLASHMOE_LANES(std::sqrt(a.v[i])); }
FLASHMOE_INLINE F32x16 round_even(F32x16 a) { FLASHMOE_LANES(std::nearbyint(a.v[i])); }
// 2^n of integral lanes in [-126, 127]; anything for NaN.
FLASHMOE_INLINE F32x16 exp2_integer(F32x16 n) {
  F32x16 out;
  for (int i = 0; i < 16; ++i) {
    const int32_t exponent = std::isnan(n.v[i]) ? 0 : static_cast<int32_t>(n.v[i]);
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    std::memcpy(&out.v[i], &bits, 4);
  }
  return out;
}
FLASHMOE_INLINE F32x16 zero_where_below(F32x16 a, F32x16 x, float limit) {
  FLASHMOE_LANES(x.v[i] < limit ? 0.0f : a.v[i]);
}

FLASHMOE_INLINE float bf16_to_f32(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
FLASHMOE_INLINE float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u, fraction = bits & 1023u;
  float out;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    out = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -out : out;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
  std::memcpy(&out, &wide, 4);
  return out;
}
// Round to nearest, ties to even, overflow to infinity: what vcvtps2ph does.
FLASHMOE_INLINE uint16_t f32_to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65,520 and above
  if (bits < 0x38800000u) {                        // below 2^-14: subnormal, exact scaling then rounding
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))));
  }
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
FLASHMOE_INLINE F32x16 load_bf16(const uint16_t* p) { FLASHMOE_LANES(bf16_to_f32(p[i])); }
FLASHMOE_INLINE F32x16 load_f16(const uint16_t* p) { FLASHMOE_LANES(f16_to_f32(p[i])); }
FLASHMOE_INLINE F32x16 load_i8(const int8_t* p) { FLASHMOE_LANES(static_cast<float>(p[i])); }
FLASHMOE_INLINE void store_f16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(a.v[i]);
}

// Lane i: bit i of bits ? a : b.
FLASHMOE_INLINE F32x16 select_lanes(uint32_t bits, F32x16 a, F32x16 b) {
  FLASHMOE_LANES((bits >> i) & 1u ? a.v[i] : b.v[i]);
}

#undef FLASHMOE_LANES

// Lanes i and i + 8, then + 4, + 2, + 1: the tree of every instruction set.
inline float reduce_add(F32x16 v) {
  float lane[16];
  store(lane, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

inline float reduce_max(F32x16 v) {
  float lane[16];
  store(lane, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

#include "flashmoe/simd/common-inl.h"

}  // namespace flashmoe::scalar
