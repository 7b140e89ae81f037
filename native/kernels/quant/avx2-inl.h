// Integer vectors of 256 bits, two for sixteen lanes; included in the namespace of each level that uses them,
// which defines dot4 and dot4_wide itself.

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
FLASHMOE_INLINE U8x64 u8_lookup(U8x64 table, U8x64 codes) {
  return {
      {_mm256_shuffle_epi8(table.half[0], codes.half[0]), _mm256_shuffle_epi8(table.half[1], codes.half[1])}};
}
FLASHMOE_INLINE I32x16 i32_zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
FLASHMOE_INLINE I32x16 i32_add(I32x16 a, I32x16 b) {
  return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}
FLASHMOE_INLINE I32x16 i32_sixteenth(I32x16 v) {
  return {{_mm256_srai_epi32(v.half[0], 4), _mm256_srai_epi32(v.half[1], 4)}};
}
FLASHMOE_INLINE U8x64 u8_load_once(const uint8_t* p) { return u8_load(p); }
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
