// The definition of the quantised kernels in plain C++; every other file must give the same bits.
#include "flashmoe/simd/scalar.h"
#include "flashmoe/quant_kernels.h"

#include <cmath>
#include <cstring>

namespace flashmoe::scalar {
namespace {

constexpr int kTogether = 4;
constexpr bool kSpecialised = false;

struct U8x64 {
  uint32_t lane[16];
};
struct I32x16 {
  int32_t lane[16];
};

inline U8x64 u8_load(const uint8_t* p) {
  U8x64 v;
  std::memcpy(v.lane, p, 64);
  return v;
}
inline U8x64 u8_and(U8x64 v, uint8_t mask) {
  for (uint32_t& lane : v.lane) lane &= 0x01010101u * mask;
  return v;
}
inline U8x64 u8_shr(U8x64 v, int bits) {
  for (uint32_t& lane : v.lane) lane >>= bits;
  return v;
}
inline U8x64 u8_shl(U8x64 v, int bits) {
  for (uint32_t& lane : v.lane) lane <<= bits;
  return v;
}
inline U8x64 u8_or(U8x64 a, U8x64 b) {
  for (int i = 0; i < 16; ++i) a.lane[i] |= b.lane[i];
  return a;
}
inline U8x64 u8_lookup(U8x64 table, U8x64 codes) {
  uint8_t entry[64], code[64];
  std::memcpy(entry, table.lane, 64);
  std::memcpy(code, codes.lane, 64);
  for (uint8_t& c : code) c = entry[c];
  std::memcpy(codes.lane, code, 64);
  return codes;
}
inline I32x16 i32_zero() { return I32x16{}; }
inline I32x16 i32_add(I32x16 a, I32x16 b) {
  for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline I32x16 dot4_wide(I32x16 acc, U8x64 codes, int32_t x4) {
  const uint32_t x = static_cast<uint32_t>(x4);
  for (int i = 0; i < 16; ++i) {
    for (int b = 0; b < 4; ++b) {
      acc.lane[i] +=
          static_cast<int32_t>((codes.lane[i] >> (8 * b)) & 0xff) * static_cast<int8_t>(x >> (8 * b));
    }
  }
  return acc;
}
inline I32x16 dot4(I32x16 acc, U8x64 codes, int32_t x4) { return dot4_wide(acc, codes, x4); }
inline F32x16 to_f32(I32x16 v) {
  float out[16];
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(v.lane[i]);
  return load(out);
}
inline F32x16 byte_f32(U8x64 v, int byte) {
  float out[16];
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>((v.lane[i] >> (8 * byte)) & 0xff);
  return load(out);
}
inline F32x16 load_scales(const uint8_t* p, bool f16) {
  uint16_t raw[16];
  std::memcpy(raw, p, sizeof raw);
  return f16 ? load_f16(raw) : load_bf16(raw);
}
inline I32x16 round_i32(F32x16 v) {
  I32x16 out;
  for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<int32_t>(std::nearbyint(v.v[i]));
  return out;
}
inline void store_i8(int8_t* p, I32x16 v) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(v.lane[i]);
}

}  // namespace

#include "kernels/quant/quant-inl.h"

}  // namespace flashmoe::scalar

namespace flashmoe {
const QuantKernels& quant_kernels_scalar() { return scalar::kTable; }
}  // namespace flashmoe
