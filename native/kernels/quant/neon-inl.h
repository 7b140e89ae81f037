// Integer vectors of the Arm levels; included in the namespace of each, which defines
//   int32x4_t dot16(int32x4_t acc, int8x16_t codes, int8x16_t x)                 sums of four products
//   int32x4_t dot16_wide(int32x4_t acc, uint8x16_t codes, int8x16_t x)           codes up to 255
// before.

constexpr int kTogether = 4;
constexpr bool kSpecialised = true;

struct U8x64 {
  uint8x16_t q[4];  // rows 4i..4i+3
};
struct I32x16 {
  int32x4_t q[4];
};

#define FLASHMOE_QUARTERS(Type, expression)             \
  Type result;                                          \
  FLASHMOE_UNROLL(4)                                    \
  for (int i = 0; i < 4; ++i) result.q[i] = expression; \
  return result

FLASHMOE_INLINE U8x64 u8_load(const uint8_t* p) { FLASHMOE_QUARTERS(U8x64, vld1q_u8(p + 16 * i)); }
FLASHMOE_INLINE U8x64 u8_and(U8x64 v, uint8_t mask) {
  FLASHMOE_QUARTERS(U8x64, vandq_u8(v.q[i], vdupq_n_u8(mask)));
}
// Shifts of 32-bit lanes; a negative count shifts right.
FLASHMOE_INLINE uint8x16_t shifted(uint8x16_t v, int left) {
  return vreinterpretq_u8_u32(vshlq_u32(vreinterpretq_u32_u8(v), vdupq_n_s32(left)));
}
FLASHMOE_INLINE U8x64 u8_shr(U8x64 v, int bits) { FLASHMOE_QUARTERS(U8x64, shifted(v.q[i], -bits)); }
FLASHMOE_INLINE U8x64 u8_shl(U8x64 v, int bits) { FLASHMOE_QUARTERS(U8x64, shifted(v.q[i], bits)); }
FLASHMOE_INLINE U8x64 u8_or(U8x64 a, U8x64 b) { FLASHMOE_QUARTERS(U8x64, vorrq_u8(a.q[i], b.q[i])); }
FLASHMOE_INLINE U8x64 u8_lookup(U8x64 table, U8x64 codes) {
  FLASHMOE_QUARTERS(U8x64, vqtbl1q_u8(table.q[i], codes.q[i]));
}
FLASHMOE_INLINE I32x16 i32_zero() { FLASHMOE_QUARTERS(I32x16, vdupq_n_s32(0)); }
FLASHMOE_INLINE I32x16 i32_add(I32x16 a, I32x16 b) { FLASHMOE_QUARTERS(I32x16, vaddq_s32(a.q[i], b.q[i])); }
FLASHMOE_INLINE I32x16 dot4(I32x16 acc, U8x64 codes, int32_t x4) {
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(x4));
  FLASHMOE_QUARTERS(I32x16, dot16(acc.q[i], vreinterpretq_s8_u8(codes.q[i]), x));
}
FLASHMOE_INLINE I32x16 dot4_wide(I32x16 acc, U8x64 codes, int32_t x4) {
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(x4));
  FLASHMOE_QUARTERS(I32x16, dot16_wide(acc.q[i], codes.q[i], x));
}
FLASHMOE_INLINE F32x16 to_f32(I32x16 v) { FLASHMOE_QUARTERS(F32x16, vcvtq_f32_s32(v.q[i])); }
FLASHMOE_INLINE F32x16 byte_f32(U8x64 v, int byte) {
  const uint32x4_t mask = vdupq_n_u32(0xff);
  FLASHMOE_QUARTERS(F32x16, vcvtq_f32_u32(vandq_u32(vreinterpretq_u32_u8(shifted(v.q[i], -8 * byte)), mask)));
}
FLASHMOE_INLINE F32x16 load_scales(const uint8_t* p, bool f16) {
  const uint16_t* raw = reinterpret_cast<const uint16_t*>(p);
  return f16 ? load_f16(raw) : load_bf16(raw);
}
FLASHMOE_INLINE I32x16 round_i32(F32x16 v) { FLASHMOE_QUARTERS(I32x16, vcvtnq_s32_f32(v.q[i])); }
FLASHMOE_INLINE void store_i8(int8_t* p, I32x16 v) {
  const int16x8_t low = vcombine_s16(vmovn_s32(v.q[0]), vmovn_s32(v.q[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(v.q[2]), vmovn_s32(v.q[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

#undef FLASHMOE_QUARTERS
