// Body of the quantised kernels, included once per instruction set inside its namespace.
// Needs F32x16 and its functions (flashmoe/simd), and from the including file:
//   U8x64 u8_load(p); u8_and(v, u8); u8_shr(v, bits); u8_shl(v, bits); u8_or(a, b)      bytes of 16 u32 lanes
//   I32x16 i32_zero(); dot4(acc, codes <= 127, four int8 in an int32); dot4_wide(acc, codes <= 255, ...)
//   F32x16 to_f32(I32x16); F32x16 byte_f32(U8x64, byte 0..3); F32x16 load_scales(p, f16)
//   I32x16 round_i32(F32x16); I32x16 i32_add(a, b); i32_shl7(v); void split_planes(I32x16, int8_t* high,
//   int8_t* low)

namespace {

constexpr int64_t kTokenBlock = 16;  // accumulators of a block: 2 x 1 KiB, well inside L1

constexpr float kLevels = 16256.0f;  // 127 * 128: the high plane stays within int8 after rounding

struct GroupCodes {
  U8x64 columns[16];  // columns 4i..4i+3 of 16 rows, one code a byte
};

FLASHMOE_INLINE void unpack_2bit(const uint8_t* p, int group, U8x64* columns) {
  for (int step = 0; step < group / 16; ++step) {
    const U8x64 v = u8_load(p + 64 * step);
    columns[4 * step] = u8_and(v, 0x03);
    columns[4 * step + 1] = u8_and(u8_shr(v, 2), 0x03);
    columns[4 * step + 2] = u8_and(u8_shr(v, 4), 0x03);
    columns[4 * step + 3] = u8_and(u8_shr(v, 6), 0x03);
  }
}

FLASHMOE_INLINE void unpack_3bit(const uint8_t* p, int group, U8x64* columns) {
  unpack_2bit(p, group, columns);
  const uint8_t* high = p + 4 * group;
  for (int step = 0; step < group / 32; ++step) {
    const U8x64 v = u8_load(high + 64 * step);
    for (int j = 0; j < 8; ++j) {
      const U8x64 bit = u8_and(u8_shr(v, j), 0x01);
      columns[8 * step + j] = u8_or(columns[8 * step + j], u8_shl(bit, 2));
    }
  }
}

FLASHMOE_INLINE void unpack(const uint8_t* p, int bits, int group, U8x64* columns) {
  if (bits == 4) {
    for (int step = 0; step < group / 8; ++step) {
      const U8x64 v = u8_load(p + 64 * step);
      columns[2 * step] = u8_and(v, 0x0f);
      columns[2 * step + 1] = u8_and(u8_shr(v, 4), 0x0f);
    }
  } else if (bits == 8) {
    for (int step = 0; step < group / 4; ++step) columns[step] = u8_load(p + 64 * step);
  } else if (bits == 2) {
    unpack_2bit(p, group, columns);
  } else {
    unpack_3bit(p, group, columns);
  }
}

FLASHMOE_INLINE int32_t load_x4(const int8_t* q) {
  int32_t value;
  __builtin_memcpy(&value, q, 4);
  return value;
}

FLASHMOE_INLINE I32x16 dot_any(I32x16 acc, U8x64 codes, int bits, int32_t x4) {
  return bits == 8 ? dot4_wide(acc, codes, x4) : dot4(acc, codes, x4);
}

// Exact integer product of one group: the planes are separate chains, which also hides the dot product's
// latency.
FLASHMOE_INLINE I32x16 group_dot(const U8x64* columns, int bits, int group, const int8_t* high,
                                 const int8_t* low) {
  I32x16 sum_high = i32_zero(), sum_low = i32_zero();
  for (int i = 0; i < group / 4; ++i) {
    sum_high = dot_any(sum_high, columns[i], bits, load_x4(high + 4 * i));
    sum_low = dot_any(sum_low, columns[i], bits, load_x4(low + 4 * i));
  }
  return i32_add(i32_shl7(sum_high), sum_low);
}

FLASHMOE_INLINE F32x16 group_dot_f32(const U8x64* columns, int group, const float* x) {
  F32x16 d = zero();
  for (int i = 0; i < group / 4; ++i) {
    for (int b = 0; b < 4; ++b) d = fma(byte_f32(columns[i], b), set1(x[4 * i + b]), d);
  }
  return d;
}

// acc += this group's share of the product for one token.
FLASHMOE_INLINE F32x16 add_group(F32x16 acc, const U8x64* columns, int bits, int group, F32x16 scales,
                                 F32x16 biases, const Activations& x, int64_t row, int64_t g) {
  const float sum = x.sum[row * x.groups + g];
  if (x.q != nullptr) {
    const int8_t* high = x.q + 2 * row * x.cols + g * group;
    const I32x16 dot = group_dot(columns, bits, group, high, high + x.cols);
    acc = fma(to_f32(dot), mul(scales, set1(x.scale[row * x.groups + g])), acc);
  } else {
    acc = fma(scales, group_dot_f32(columns, group, x.x + row * x.cols + g * group), acc);
  }
  return fma(biases, set1(sum), acc);
}

// One row tile (16 rows) times a block of tokens; `acc` holds one vector a token.
FLASHMOE_INLINE void tile_times_tokens(const uint8_t* tile, int64_t stride, int64_t groups, int bits,
                                       int group, bool f16, const Activations& x, const int32_t* in,
                                       int64_t first, int64_t count, F32x16* acc) {
  const int64_t payload = kTileRows * group * bits / 8;
  for (int64_t t = 0; t < count; ++t) acc[t] = zero();
  for (int64_t g = 0; g < groups; ++g, tile += stride) {
    // 2 KiB ahead is about what one core has in flight at full bandwidth.
    for (int64_t ahead = 0; ahead < payload + 64; ahead += 64) __builtin_prefetch(tile + 2048 + ahead);
    GroupCodes codes;
    unpack(tile, bits, group, codes.columns);
    const F32x16 scales = load_scales(tile + payload, f16);
    const F32x16 biases = load_scales(tile + payload + 2 * kTileRows, f16);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = in != nullptr ? in[first + t] : first + t;
      acc[t] = add_group(acc[t], codes.columns, bits, group, scales, biases, x, row, g);
    }
  }
}

// Constant bits and group let the compiler unroll the unpacking; each pair is its own loop.
void tile_block(const TileMatrix& w, const uint8_t* tile, const Activations& x, const int32_t* in,
                int64_t first, int64_t count, F32x16* acc) {
  const int64_t stride = w.tile_stride;
  if (w.bits == 4 && w.group == 64) {
    if (count == 1)
      return tile_times_tokens(tile, stride, w.groups, 4, 64, w.f16_scales, x, in, first, 1, acc);
    return tile_times_tokens(tile, stride, w.groups, 4, 64, w.f16_scales, x, in, first, count, acc);
  }
  if (w.bits == 8 && w.group == 64) {
    return tile_times_tokens(tile, stride, w.groups, 8, 64, w.f16_scales, x, in, first, count, acc);
  }
  if (w.bits == 3 && w.group == 64) {
    return tile_times_tokens(tile, stride, w.groups, 3, 64, w.f16_scales, x, in, first, count, acc);
  }
  if (w.bits == 2 && w.group == 64) {
    return tile_times_tokens(tile, stride, w.groups, 2, 64, w.f16_scales, x, in, first, count, acc);
  }
  tile_times_tokens(tile, stride, w.groups, w.bits, w.group, w.f16_scales, x, in, first, count, acc);
}

void write_rows(F32x16 y, float* out, int64_t rows, const float* weight) {
  if (weight != nullptr) y = fma(set1(*weight), y, load_n(out, rows));
  store_n(out, y, rows);
}

void matmul(const TileMatrix& w, const Activations& x, const TokenRows& tokens, int64_t tile_begin,
            int64_t tile_end, float* out, int64_t out_stride) {
  F32x16 acc[kTokenBlock];
  for (int64_t rt = tile_begin; rt < tile_end; ++rt) {
    const uint8_t* tile = w.tiles + rt * w.groups * w.tile_stride;
    const int64_t rows = w.rows - rt * kTileRows < kTileRows ? w.rows - rt * kTileRows : kTileRows;
    for (int64_t first = 0; first < tokens.count; first += kTokenBlock) {
      const int64_t count = tokens.count - first < kTokenBlock ? tokens.count - first : kTokenBlock;
      tile_block(w, tile, x, tokens.in, first, count, acc);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t row = tokens.out != nullptr ? tokens.out[first + t] : first + t;
        const float* weight = tokens.weight != nullptr ? tokens.weight + first + t : nullptr;
        write_rows(acc[t], out + row * out_stride + rt * kTileRows, rows, weight);
      }
    }
  }
}

void matmul_glu(const TileMatrix& w, const Activations& x, const TokenRows& tokens, int64_t tile_begin,
                int64_t tile_end, float* out, int64_t out_stride) {
  F32x16 gate[kTokenBlock], up[kTokenBlock];
  const int64_t tile_nbytes = w.tile_stride / 2;
  for (int64_t rt = tile_begin; rt < tile_end; ++rt) {
    const uint8_t* tile = w.tiles + rt * w.groups * w.tile_stride;
    const int64_t rows = w.rows - rt * kTileRows < kTileRows ? w.rows - rt * kTileRows : kTileRows;
    for (int64_t first = 0; first < tokens.count; first += kTokenBlock) {
      const int64_t count = tokens.count - first < kTokenBlock ? tokens.count - first : kTokenBlock;
      tile_block(w, tile, x, tokens.in, first, count, gate);
      tile_block(w, tile + tile_nbytes, x, tokens.in, first, count, up);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t row = tokens.out != nullptr ? tokens.out[first + t] : first + t;
        store_n(out + row * out_stride + rt * kTileRows, mul(silu(gate[t]), up[t]), rows);
      }
    }
  }
}

void group_sums(const float* x, int64_t cols, int group, float* sum) {
  for (int64_t g = 0; g < cols / group; ++g) {
    F32x16 s = load(x + g * group);
    for (int i = 16; i < group; i += 16) s = add(s, load(x + g * group + i));
    sum[g] = reduce_add(s);
  }
}

void quantize(const float* x, int64_t cols, int group, int8_t* q, float* scale, float* sum) {
  for (int64_t g = 0; g < cols / group; ++g) {
    const float* in = x + g * group;
    F32x16 largest = abs(load(in));
    for (int i = 16; i < group; i += 16) largest = max(largest, abs(load(in + i)));
    const float amax = reduce_max(largest);
    scale[g] = amax / kLevels;
    // Below 1e-34 the reciprocal overflows; such a group is zero to any later arithmetic.
    const F32x16 inverse = set1(amax > 1e-34f ? kLevels / amax : 0.0f);
    I32x16 total = i32_zero();
    for (int i = 0; i < group; i += 16) {
      const I32x16 value = round_i32(mul(load(in + i), inverse));
      split_planes(value, q + g * group + i, q + cols + g * group + i);
      total = i32_add(total, value);
    }
    sum[g] = scale[g] * reduce_add(to_f32(total));  // exact: every partial sum is below 2^24
  }
}

void dequantize_row(const TileMatrix& w, int64_t row, float* out) {
  const int64_t payload = kTileRows * w.group * w.bits / 8;
  const int64_t lane = row % kTileRows;
  const uint8_t* tile = w.tiles + row / kTileRows * w.groups * w.tile_stride;
  for (int64_t g = 0; g < w.groups; ++g, tile += w.tile_stride) {
    GroupCodes codes;
    unpack(tile, w.bits, w.group, codes.columns);
    float scales[16], biases[16];
    store(scales, load_scales(tile + payload, w.f16_scales));
    store(biases, load_scales(tile + payload + 2 * kTileRows, w.f16_scales));
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes.columns) + 4 * lane;
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
    out[r] = reduce_add(acc);
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
    __builtin_prefetch(data + i + 4096);
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

constexpr QuantKernels kTable = {quantize, group_sums, matmul,      matmul_glu, dequantize_row,
                                 dense,    accumulate, sigmoid_all, read_all};

}  // namespace
