// Body of the quantised kernels, included once per instruction set inside its namespace.
// Needs F32x16 and its functions (flashmoe/simd), and from the including file:
//   U8x64 u8_load(p); u8_and(v, u8); u8_shr(v, bits); u8_shl(v, bits); u8_or(a, b)      bytes of 16 u32 lanes
//   I32x16 i32_zero(); dot4(acc, codes <= 127, four int8 in an int32); dot4_wide(acc, codes <= 255, ...)
//   U8x64 u8_lookup(table of 16 bytes four times over, codes below 16)
//   F32x16 to_f32(I32x16); F32x16 byte_f32(U8x64, byte 0..3); F32x16 load_scales(p, f16)
//   constexpr int kTogether, tokens whose sums fit the registers beside a group's codes; bool kSpecialised,
//   one copy of the product for each common codec I32x16 round_i32(F32x16); I32x16 i32_add(a, b); void
//   store_i8(int8_t*, I32x16)
// and where the products of dot4 take codes up to 255: FLASHMOE_WIDE_CODES, I32x16 i32_sixteenth(multiples of
// 16),
//   U8x64 u8_load_once(p)

namespace {

constexpr float kLevels = 127.0f;
constexpr float kLowLevels = 128.0f;  // the rest after rounding is at most half a level: 64 steps of int8

#include "kernels/quant/unpack-inl.h"

#include "kernels/quant/quantize-inl.h"

#include "kernels/quant/matmul-inl.h"

void dequantize_row(const TileMatrix& w, int64_t row, float* out) {
  alignas(64) uint8_t table[kTableNbytes];
  const TileShape shape = tile_shape(w, table);
  const int64_t lane = row % kTileRows;
  const uint8_t* tile = w.tiles + row / kTileRows * w.groups * w.tile_stride;
  for (int64_t g = 0; g < w.groups; ++g, tile += w.tile_stride) {
    U8x64 columns[kMaxColumns];
    unpack(tile, shape, columns);
    float scales[16], biases[16];
    store(scales, load_scales(tile + shape.payload, shape.f16));
    store(biases, load_scales(tile + shape.payload + 2 * kTileRows, shape.f16));
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(columns) + 4 * lane;
    for (int c = 0; c < w.group; ++c) {
      const float product = scales[lane] * static_cast<float>(bytes[(c / 4) * 64 + c % 4]);
      out[g * w.group + c] = product + biases[lane];
    }
  }
}

FLASHMOE_INLINE F32x16 load_dense(const DenseMatrix& w, int64_t at, int64_t n) {
  if (w.type == DenseMatrix::Type::f32) return load_n(static_cast<const float*>(w.data) + at, n);
  // 16-bit tails go through a padded copy: the weights have no slack after their last element.
  uint16_t padded[16] = {};
  __builtin_memcpy(padded, static_cast<const uint16_t*>(w.data) + at, static_cast<size_t>(2 * n));
  return w.type == DenseMatrix::Type::bf16 ? load_bf16(padded) : load_f16(padded);
}

void dense(const DenseMatrix& w, const float* x, int64_t row_begin, int64_t row_end, float* out) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    F32x16 acc = zero();
    for (int64_t c = 0; c < w.cols; c += 16) {
      const int64_t n = w.cols - c < 16 ? w.cols - c : 16;
      acc = fma(load_dense(w, r * w.cols + c, n), load_n(x + c, n), acc);
    }
    out[r] = w.bias == nullptr ? reduce_add(acc) : reduce_add(acc) + w.bias[r];
  }
}

void accumulate(float weight, const float* y, int64_t n, float* out) {
  const F32x16 w = set1(weight);
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t m = n - i < 16 ? n - i : 16;
    store_n(out + i, fma(w, load_n(y + i, m), load_n(out + i, m)), m);
  }
}

void sigmoid_all(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t m = n - i < 16 ? n - i : 16;
    store_n(out + i, sigmoid(load_n(x + i, m)), m);
  }
}

uint32_t read_all(const uint8_t* data, int64_t nbytes) {
  U8x64 a = u8_and(u8_load(data), 0), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 256 <= nbytes; i += 256) {
    for (int64_t line = 0; line < 256; line += 64) {
      __builtin_prefetch(data + i + 4096 + line, 0, kSecondLevel);  // 35 GB/s; one line of the four: 31
    }
    a = u8_or(a, u8_load(data + i));
    b = u8_or(b, u8_load(data + i + 64));
    c = u8_or(c, u8_load(data + i + 128));
    d = u8_or(d, u8_load(data + i + 192));
  }
  for (; i < nbytes; i += 64) a = u8_or(a, u8_load(data + i));
  const U8x64 all = u8_or(u8_or(a, b), u8_or(c, d));
  uint32_t first;
  __builtin_memcpy(&first, &all, 4);
  return first;
}

// Twelve chains hide the latency of the dot product on every known core.
uint32_t multiply_registers(int64_t rounds) {
  I32x16 acc[12];
  for (int j = 0; j < 12; ++j) acc[j] = i32_zero();
  uint8_t ones[64];
  __builtin_memset(ones, 1, sizeof ones);
  const U8x64 codes = u8_load(ones);
  for (int64_t i = 0; i < rounds; ++i) {
    FLASHMOE_UNROLL(16)
    for (int step = 0; step < 16; ++step) {
      FLASHMOE_UNROLL(12)
      for (int j = 0; j < 12; ++j) acc[j] = dot4(acc[j], codes, static_cast<int32_t>(rounds));
    }
  }
  I32x16 all = acc[0];
  for (int j = 1; j < 12; ++j) all = i32_add(all, acc[j]);
  uint32_t first;
  __builtin_memcpy(&first, &all, 4);
  return first;
}

constexpr QuantKernels kTable = {quantize, group_sums, matmul,      matmul_glu, dequantize_row,
                                 dense,    accumulate, sigmoid_all, read_all,   multiply_registers};

}  // namespace
