#include "flashmoe/quant_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "flashmoe/simd/avx512.h"
#include "flashmoe/target.h"

FLASHMOE_TARGET_BEGIN_AVX512
namespace flashmoe::avx512 {
namespace {

constexpr int kTogether = 8;
constexpr bool kSpecialised = true;

using U8x64 = __m512i;
using I32x16 = __m512i;
typedef int32_t __attribute__((may_alias, aligned(1))) Int32;

FLASHMOE_INLINE U8x64 u8_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
FLASHMOE_INLINE U8x64 u8_and(U8x64 v, uint8_t mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}
FLASHMOE_INLINE U8x64 u8_shr(U8x64 v, int bits) { return _mm512_srli_epi32(v, static_cast<unsigned>(bits)); }
FLASHMOE_INLINE U8x64 u8_shl(U8x64 v, int bits) { return _mm512_slli_epi32(v, static_cast<unsigned>(bits)); }
FLASHMOE_INLINE U8x64 u8_or(U8x64 a, U8x64 b) { return _mm512_or_si512(a, b); }
FLASHMOE_INLINE U8x64 u8_lookup(U8x64 table, U8x64 codes) { return _mm512_shuffle_epi8(table, codes); }
FLASHMOE_INLINE I32x16 i32_zero() { return _mm512_setzero_si512(); }
// Codes up to 255 in every product (few-inl.h).  The compiler would load them once for each use.
#define FLASHMOE_WIDE_CODES
FLASHMOE_INLINE U8x64 u8_load_once(const uint8_t* p) {
  U8x64 v = u8_load(p);
  asm volatile("" : "+v"(v));  // in the order written
  return v;
}
FLASHMOE_INLINE I32x16 i32_sixteenth(I32x16 v) { return _mm512_srai_epi32(v, 4); }
FLASHMOE_INLINE I32x16 i32_add(I32x16 a, I32x16 b) { return _mm512_add_epi32(a, b); }
// vpdpbusd does not saturate: 8-bit codes need no special care.
FLASHMOE_INLINE I32x16 dot4(I32x16 acc, U8x64 codes, int32_t x4) {
  return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(x4));
}
FLASHMOE_INLINE I32x16 dot4_wide(I32x16 acc, U8x64 codes, int32_t x4) { return dot4(acc, codes, x4); }
// The compiler broadcasts into a register of its own; with the broadcast inside the instruction twice as many
// products are in flight before the registers to rename to run out.
#define FLASHMOE_DOT4_FROM_MEMORY
FLASHMOE_INLINE I32x16 dot4_at(I32x16 acc, U8x64 codes, int /*bits*/, const int8_t* x4) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*reinterpret_cast<const Int32*>(x4)));
  return acc;
}
// Left to itself the compiler puts the broadcast back into each product (pair-inl.h).
#define FLASHMOE_PAIRED_TILES
FLASHMOE_INLINE I32x16 broadcast4(const int8_t* x4) {
  I32x16 x;
  asm("vpbroadcastd %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const Int32*>(x4)));
  return x;
}
FLASHMOE_INLINE I32x16 dot4_with(I32x16 acc, U8x64 codes, I32x16 x4) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x4));
  return acc;
}
FLASHMOE_INLINE F32x16 to_f32(I32x16 v) { return F32x16{_mm512_cvtepi32_ps(v)}; }
FLASHMOE_INLINE F32x16 byte_f32(U8x64 v, int byte) {
  return F32x16{_mm512_cvtepi32_ps(_mm512_and_si512(u8_shr(v, 8 * byte), _mm512_set1_epi32(0xff)))};
}
FLASHMOE_INLINE F32x16 load_scales(const uint8_t* p, bool f16) {
  const uint16_t* raw = reinterpret_cast<const uint16_t*>(p);
  return f16 ? load_f16(raw) : load_bf16(raw);
}
FLASHMOE_INLINE I32x16 round_i32(F32x16 v) { return _mm512_cvtps_epi32(v.v); }
FLASHMOE_INLINE void store_i8(int8_t* p, I32x16 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}

}  // namespace

#include "kernels/quant/quant-inl.h"

}  // namespace flashmoe::avx512
FLASHMOE_TARGET_END

namespace flashmoe {
const QuantKernels& quant_kernels_avx512vnni() { return avx512::kTable; }
}  // namespace flashmoe
#endif
