// Tiles times tokens; part of quant-inl.h.
//
// Two tiles are worked on together, gate and up or two neighbouring row tiles: they share the activations,
// which stay in the first-level cache in between.  A tile's codes are unpacked once, into registers where
// there are enough of them, and meet a block of tokens, four at a time so that eight integer chains hide the
// latency.

constexpr int64_t kTokenBlock = 64;  // accumulators of two tiles: 8 KiB of the first-level cache
constexpr int64_t kPrefetch = 2048;  // bytes ahead: about what one core has in flight at full bandwidth

struct TileShape {
  int bits;
  int group;
  int64_t payload;  // bytes of codes
  bool f16;         // scales and biases; bf16 otherwise
};

// The tokens of one pass.
struct TokenBlock {
  const Activations* x;
  int64_t first;
  int64_t count;
  const uint64_t* fine;  // per group: bit t set when token t has a low plane
};

FLASHMOE_INLINE int32_t load_x4(const int8_t* q) {
  int32_t value;
  __builtin_memcpy(&value, q, 4);
  return value;
}

FLASHMOE_INLINE I32x16 dot_any(I32x16 acc, U8x64 codes, int bits, int32_t x4) {
  return bits == 8 ? dot4_wide(acc, codes, x4) : dot4(acc, codes, x4);
}

// Exact integer product of one group with n (<= 8) neighbouring tokens.  One base address: with an address
// for each token the compiler ran out of registers, and a third of the speed was gone.
FLASHMOE_INLINE void group_dots(const U8x64* columns, const TileShape& shape, const int8_t* x, int n,
                                I32x16* d) {
  for (int j = 0; j < n; ++j) d[j] = i32_zero();
  FLASHMOE_UNROLL(16)
  for (int i = 0; i < shape.group / 4; ++i) {
    FLASHMOE_UNROLL(8)
    for (int j = 0; j < n; ++j) {
      d[j] = dot_any(d[j], columns[i], shape.bits, load_x4(x + j * shape.group + 4 * i));
    }
  }
}

FLASHMOE_INLINE I32x16 group_dot(const U8x64* columns, const TileShape& shape, const int8_t* x) {
  // Two chains: one token alone would wait for the latency of each step.
  I32x16 even = i32_zero(), odd = i32_zero();
  FLASHMOE_UNROLL(8)
  for (int i = 0; i < shape.group / 4; i += 2) {
    even = dot_any(even, columns[i], shape.bits, load_x4(x + 4 * i));
    odd = dot_any(odd, columns[i + 1], shape.bits, load_x4(x + 4 * i + 4));
  }
  return i32_add(even, odd);
}

FLASHMOE_INLINE F32x16 group_dot_f32(const U8x64* columns, int group, const float* x) {
  F32x16 d = zero();
  for (int i = 0; i < group / 4; ++i) {
    for (int b = 0; b < 4; ++b) d = fma(byte_f32(columns[i], b), set1(x[4 * i + b]), d);
  }
  return d;
}

FLASHMOE_INLINE F32x16 add_product(F32x16 acc, F32x16 d, F32x16 scales, float scale, F32x16 biases,
                                   float sum) {
  return fma(biases, set1(sum), fma(d, mul(scales, set1(scale)), acc));
}

// What the tokens of a block need of one group.
struct GroupRows {
  const int8_t* high;
  const int8_t* low;
  const float* scale;
  const float* sum;
};

// n tokens (at most 8) from the t-th on, together.
FLASHMOE_INLINE void add_tokens(const U8x64* columns, const TileShape& shape, F32x16 scales, F32x16 biases,
                                const GroupRows& rows, int64_t t, int n, float* acc) {
  I32x16 d[8];
  if (n == 1) {
    d[0] = group_dot(columns, shape, rows.high + t * shape.group);
  } else {
    group_dots(columns, shape, rows.high + t * shape.group, n, d);
  }
  float* a = acc + t * kTileRows;
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j, a += kTileRows) {
    store(a, add_product(load(a), to_f32(d[j]), scales, rows.scale[t + j], biases, rows.sum[t + j]));
  }
}

// acc[t] += one group's share for every token of the block.
FLASHMOE_INLINE void add_group_int8(const U8x64* columns, const TileShape& shape, F32x16 scales,
                                    F32x16 biases, const TokenBlock& block, int64_t g, float* acc) {
  const Activations& x = *block.x;
  const int64_t at = g * x.tokens + block.first;
  const GroupRows rows{x.high + at * shape.group, x.low + at * shape.group, x.scale + at, x.sum + at};
  int64_t t = 0;
  for (; t + kTogether <= block.count; t += kTogether) {
    add_tokens(columns, shape, scales, biases, rows, t, kTogether, acc);
  }
  if (kTogether > 4 && t + 4 <= block.count) {
    add_tokens(columns, shape, scales, biases, rows, t, 4, acc);
    t += 4;
  }
  for (; t < block.count; ++t) add_tokens(columns, shape, scales, biases, rows, t, 1, acc);
  for (uint64_t left = block.fine[g]; left != 0; left &= left - 1) {
    const int64_t fine = __builtin_ctzll(left);
    const F32x16 d = to_f32(group_dot(columns, shape, rows.low + fine * shape.group));
    float* a = acc + fine * kTileRows;
    store(a, fma(d, mul(scales, set1(rows.scale[fine] * (1.0f / kLowLevels))), load(a)));
  }
}

FLASHMOE_INLINE void add_group_f32(const U8x64* columns, const TileShape& shape, F32x16 scales, F32x16 biases,
                                   const TokenBlock& block, int64_t g, float* acc) {
  const Activations& x = *block.x;
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t row = block.first + t;
    const F32x16 d = group_dot_f32(columns, shape.group, x.x + row * x.cols + g * shape.group);
    float* a = acc + t * kTileRows;
    store(a, fma(biases, set1(x.sum[g * x.tokens + row]), fma(scales, d, load(a))));
  }
}

// `tiles` (1 or 2) row tiles times a block of tokens; acc: [tiles, kTokenBlock, 16].
FLASHMOE_INLINE void tiles_times_tokens(const uint8_t* const* tile, int tiles, int64_t stride, int64_t groups,
                                        const TileShape& shape, const TokenBlock& block, float* acc) {
  for (int p = 0; p < tiles; ++p) {
    for (int64_t t = 0; t < block.count; ++t) store(acc + (p * kTokenBlock + t) * kTileRows, zero());
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int p = 0; p < tiles; ++p) {
      const uint8_t* at = tile[p] + g * stride;
      for (int64_t ahead = 0; ahead < shape.payload + 64; ahead += 64) {
        __builtin_prefetch(at + kPrefetch + ahead);
      }
      GroupCodes codes;
      unpack(at, shape.bits, shape.group, codes.columns);
      const F32x16 scales = load_scales(at + shape.payload, shape.f16);
      const F32x16 biases = load_scales(at + shape.payload + 2 * kTileRows, shape.f16);
      float* sums = acc + p * kTokenBlock * kTileRows;
      if (block.x->high != nullptr) {
        add_group_int8(codes.columns, shape, scales, biases, block, g, sums);
      } else {
        add_group_f32(codes.columns, shape, scales, biases, block, g, sums);
      }
    }
  }
}

// Constant bits and group let the compiler unroll the unpacking and keep the codes in registers.
__attribute__((noinline)) void multiply_block(const TileMatrix& w, const uint8_t* const* tile, int tiles,
                                              const TokenBlock& block, float* acc) {
#if !defined(FLASHMOE_SANITIZED)
#define FLASHMOE_BLOCK_OF(b, g)                                                                     \
  if (kSpecialised && w.bits == b && w.group == g) {                                                \
    const TileShape shape{b, g, kTileRows * g * b / 8, w.f16_scales};                               \
    if (tiles == 2) return tiles_times_tokens(tile, 2, w.tile_stride, w.groups, shape, block, acc); \
    return tiles_times_tokens(tile, 1, w.tile_stride, w.groups, shape, block, acc);                 \
  }
  FLASHMOE_BLOCK_OF(4, 64)
  FLASHMOE_BLOCK_OF(4, 32)
  FLASHMOE_BLOCK_OF(8, 64)
  FLASHMOE_BLOCK_OF(8, 32)
  FLASHMOE_BLOCK_OF(3, 64)
  FLASHMOE_BLOCK_OF(2, 64)
#undef FLASHMOE_BLOCK_OF
#endif
  const TileShape shape{w.bits, w.group, kTileRows * w.group * w.bits / 8, w.f16_scales};
  tiles_times_tokens(tile, tiles, w.tile_stride, w.groups, shape, block, acc);
}

FLASHMOE_INLINE void mark_fine(const TokenBlock& block, int64_t groups, uint64_t* fine) {
  const uint64_t all = block.count == kTokenBlock ? ~uint64_t{0} : (uint64_t{1} << block.count) - 1;
  for (int64_t g = 0; g < groups; ++g) {
    if (block.x->fine == nullptr) {
      fine[g] = all;
      continue;
    }
    const uint8_t* flags = block.x->fine + g * block.x->tokens + block.first;
    uint64_t mask = 0;
    for (int64_t t = 0; t < block.count; ++t) mask |= static_cast<uint64_t>(flags[t]) << t;
    fine[g] = mask;
  }
}

FLASHMOE_INLINE int64_t rows_of(const TileMatrix& w, int64_t rt) {
  return w.rows - rt * kTileRows < kTileRows ? w.rows - rt * kTileRows : kTileRows;
}

FLASHMOE_INLINE void write_rows(const float* sums, const TokenRows& tokens, int64_t token, int64_t column,
                                int64_t rows, float* out, int64_t out_stride) {
  float* to = out + (tokens.out != nullptr ? tokens.out[token] : token) * out_stride + column;
  F32x16 y = load(sums);
  if (tokens.weight != nullptr) y = fma(set1(tokens.weight[token]), y, load_n(to, rows));
  store_n(to, y, rows);
}

void matmul(const TileMatrix& w, const Activations& x, const TokenRows& tokens, int64_t tile_begin,
            int64_t tile_end, float* out, int64_t out_stride) {
  alignas(64) float acc[2 * kTokenBlock * kTileRows];
  uint64_t fine[kMaxGroups];
  for (int64_t first = 0; first < tokens.count; first += kTokenBlock) {
    const int64_t left = tokens.count - first;
    const TokenBlock block{&x, first, left < kTokenBlock ? left : kTokenBlock, fine};
    if (x.high != nullptr) mark_fine(block, w.groups, fine);
    for (int64_t rt = tile_begin; rt < tile_end; rt += 2) {
      const int tiles = tile_end - rt < 2 ? 1 : 2;
      const uint8_t* tile[2] = {w.tiles + rt * w.groups * w.tile_stride,
                                w.tiles + (rt + 1) * w.groups * w.tile_stride};
      multiply_block(w, tile, tiles, block, acc);
      for (int p = 0; p < tiles; ++p) {
        for (int64_t t = 0; t < block.count; ++t) {
          write_rows(acc + (p * kTokenBlock + t) * kTileRows, tokens, first + t, (rt + p) * kTileRows,
                     rows_of(w, rt + p), out, out_stride);
        }
      }
    }
  }
}

void matmul_glu(const TileMatrix& w, const Activations& x, const TokenRows& tokens, int64_t tile_begin,
                int64_t tile_end, float* out, int64_t out_stride) {
  alignas(64) float acc[2 * kTokenBlock * kTileRows];
  uint64_t fine[kMaxGroups];
  for (int64_t first = 0; first < tokens.count; first += kTokenBlock) {
    const int64_t left = tokens.count - first;
    const TokenBlock block{&x, first, left < kTokenBlock ? left : kTokenBlock, fine};
    if (x.high != nullptr) mark_fine(block, w.groups, fine);
    for (int64_t rt = tile_begin; rt < tile_end; ++rt) {
      const uint8_t* gate = w.tiles + rt * w.groups * w.tile_stride;
      const uint8_t* tile[2] = {gate, gate + w.tile_stride / 2};
      multiply_block(w, tile, 2, block, acc);
      for (int64_t t = 0; t < block.count; ++t) {
        const F32x16 y = mul(silu(load(acc + t * kTileRows)), load(acc + (kTokenBlock + t) * kTileRows));
        store(acc + t * kTileRows, y);
        write_rows(acc + t * kTileRows, tokens, first + t, rt * kTileRows, rows_of(w, rt), out, out_stride);
      }
    }
  }
}
