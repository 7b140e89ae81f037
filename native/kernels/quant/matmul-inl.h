// Tiles times tokens; part of quant-inl.h.
//
// Two tiles are worked on together, gate and up or two neighbouring row tiles: they share the activations,
// which stay in the first-level cache in between.  A tile meets a block of tokens, a few at a time, with one
// integer chain or more for each so that the latency of the dot product is hidden.  Codes are unpacked on
// the way: kept for the whole block they took sixteen stores to the stack, which cost one token half its
// time; unpacking them again for each few tokens fits beside the products.

constexpr int64_t kTilesWritten = 8;  // row tiles whose results are written together: 512 bytes of a row
constexpr int64_t kWriteAhead = 4;    // tokens
// Tokens that meet the same row tiles before the next ones are read: with 2,048 columns their planes and
// eight tiles are 0.7 MiB of a second-level cache.  Block by block, all tiles came eight times from the third
// for 512 tokens, which neighbours on the machine share.
constexpr int64_t kTokensKept = 4 * kTokenBlock;
// Bytes ahead, and how near: into the second-level cache.  Asked for into the first, lines wait for its 24
// miss buffers, which at 110 ns a line bring a core 14 GB/s: four tokens an expert took 1.5 times as long.
constexpr int64_t kPrefetchMany = 18432;
constexpr int kSecondLevel = 2;  // __builtin_prefetch's locality

// The tokens of one pass.
struct TokenBlock {
  const Activations* x;
  int64_t first;
  int64_t count;
};

// What the tokens of a block bring to one group: their high planes, then the low ones that count.
struct GroupRows {
  const int8_t* codes;
  const float* scale;
  const float* sum;
  const uint8_t* token;
  int64_t count;
};

// One tile and what its rows are scaled with.
struct Tile {
  const uint8_t* codes;
  F32x16 scales;
  F32x16 biases;
};

#if !defined(FLASHMOE_DOT4_FROM_MEMORY)
FLASHMOE_INLINE I32x16 dot4_at(I32x16 acc, U8x64 codes, int bits, const int8_t* x4) {
  int32_t value;
  __builtin_memcpy(&value, x4, 4);
  return bits == 8 ? dot4_wide(acc, codes, value) : dot4(acc, codes, value);
}
#endif

// Exact integer products of one group with n (<= kTogether) rows of activations.  One base address: with an
// address for each row the compiler ran out of registers, and a third of the speed was gone.  Few rows get
// several chains each.
FLASHMOE_INLINE void group_dots(const uint8_t* codes, const TileShape& shape, const int8_t* x, int n,
                                I32x16* d) {
  const int chains = kTogether / n >= 4 ? 4 : kTogether / n >= 2 ? 2 : 1;
  I32x16 sums[4 * kTogether];
  FLASHMOE_UNROLL(32)
  for (int j = 0; j < n * chains; ++j) sums[j] = i32_zero();
  FLASHMOE_UNROLL(16)
  for (int i = 0; i < shape.group / 4; ++i) {
    const U8x64 column = column_values(codes, shape, i);
    FLASHMOE_UNROLL(8)
    for (int j = 0; j < n; ++j) {
      I32x16& sum = sums[j * chains + i % chains];
      sum = dot4_at(sum, column, shape.bits, x + j * shape.group + 4 * i);
    }
  }
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j) {
    const I32x16* part = sums + j * chains;
    d[j] = part[0];
    if (chains == 2) d[j] = i32_add(part[0], part[1]);
    if (chains == 4) d[j] = i32_add(i32_add(part[0], part[1]), i32_add(part[2], part[3]));
  }
}

// n rows from the r-th on, together.
FLASHMOE_INLINE void add_rows(const Tile& tile, const TileShape& shape, const GroupRows& rows, int64_t r,
                              int n, float* acc) {
  I32x16 d[kTogether];
  group_dots(tile.codes, shape, rows.codes + r * shape.group, n, d);
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j) {
    float* a = acc + rows.token[r + j] * kTileRows;
    const F32x16 scaled = mul(tile.scales, set1(rows.scale[r + j]));
    const F32x16 sum = fma(to_f32(d[j]), scaled, load(a));
    store(a, fma(tile.biases, set1(rows.sum[r + j]), sum));
  }
}

// As add_rows, with n known at run time only.
FLASHMOE_INLINE void add_batch(const Tile& tile, const TileShape& shape, const GroupRows& rows, int64_t r,
                               int n, float* acc) {
#define FLASHMOE_BATCH_OF(size)                                       \
  case size:                                                          \
    if (size <= kTogether) add_rows(tile, shape, rows, r, size, acc); \
    return;
  switch (n) {
    FLASHMOE_BATCH_OF(1)
    FLASHMOE_BATCH_OF(2)
    FLASHMOE_BATCH_OF(3)
    FLASHMOE_BATCH_OF(4)
    FLASHMOE_BATCH_OF(5)
    FLASHMOE_BATCH_OF(6)
    FLASHMOE_BATCH_OF(7)
    FLASHMOE_BATCH_OF(8)
  }
#undef FLASHMOE_BATCH_OF
}

FLASHMOE_INLINE GroupRows group_rows(const TokenBlock& block, const TileShape& shape, int64_t groups,
                                     int64_t g) {
  const PlaneRows& x = block.x->rows;
  const int64_t at = first_row(groups, block.first, block.count, g);
  const int64_t low = block.x->precise ? block.count : x.marked[block.first / kTokenBlock * groups + g];
  return {x.codes + at * shape.group, x.scale + at, (block.x->precise ? x.fine_sum : x.sum) + at,
          x.token + at, block.count + low};
}

// acc[t] += one group's share for every token of the block, in batches of nearly equal size: a last one of
// one or two rows would cost as much as five.
FLASHMOE_INLINE void add_group_int8(const Tile& tile, const TileShape& shape, const TokenBlock& block,
                                    int64_t groups, int64_t g, float* acc) {
  const GroupRows rows = group_rows(block, shape, groups, g);
  int64_t r = 0;
  for (int64_t batches = (rows.count + kTogether - 1) / kTogether; batches > 0; --batches) {
    const int64_t n = (rows.count - r + batches - 1) / batches;
    add_batch(tile, shape, rows, r, static_cast<int>(n), acc);
    r += n;
  }
}

#if defined(FLASHMOE_PAIRED_TILES)
#include "kernels/quant/pair-inl.h"
#endif

FLASHMOE_INLINE F32x16 group_dot_f32(const U8x64* columns, int group, const float* x) {
  F32x16 d = zero();
  for (int i = 0; i < group / 4; ++i) {
    for (int b = 0; b < 4; ++b) d = fma(byte_f32(columns[i], b), set1(x[4 * i + b]), d);
  }
  return d;
}

FLASHMOE_INLINE void add_group_f32(const Tile& tile, const TileShape& shape, const TokenBlock& block,
                                   int64_t groups, int64_t g, float* acc) {
  const Activations& x = *block.x;
  U8x64 columns[kMaxColumns];
  unpack(tile.codes, shape, columns);
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t row = block.first + t;
    const F32x16 d = group_dot_f32(columns, shape.group, x.x + row * x.cols + g * shape.group);
    float* a = acc + t * kTileRows;
    store(a, fma(tile.biases, set1(x.sums[block.first * groups + g * block.count + t]),
                 fma(tile.scales, d, load(a))));
  }
}

// What a call reads ends at `end`; `skip` bytes further stands what its thread reads next.
struct Ahead {
  const uint8_t* end;
  int64_t skip;
};

FLASHMOE_INLINE Ahead ahead_of(const TileMatrix& w, int64_t tile_end) {
  const uint8_t* end = w.tiles + tile_end * w.groups * w.tile_stride;
  return {end, w.after != nullptr ? w.after - end : 0};
}

FLASHMOE_INLINE void prefetch_tile(const uint8_t* at, const TileShape& shape) {
  for (int64_t i = 0; i < shape.payload + 64; i += 64) __builtin_prefetch(at + i, 0, kSecondLevel);
}

FLASHMOE_INLINE Tile tile_at(const uint8_t* at, const TileShape& shape) {
  return {at, load_scales(at + shape.payload, shape.f16),
          load_scales(at + shape.payload + 2 * kTileRows, shape.f16)};
}

// The tile at an address; the one `far` bytes behind it is asked for.
FLASHMOE_INLINE Tile tile_and_ahead(const uint8_t* at, const TileShape& shape, const Ahead& ahead,
                                    int64_t far) {
  const uint8_t* target = at + far;
  prefetch_tile(target < ahead.end ? target : target + ahead.skip, shape);
  return tile_at(at, shape);
}

// `tiles` (1 or 2) row tiles times a block of tokens; acc: [tiles, kTokenBlock, 16].
FLASHMOE_INLINE void tiles_times_tokens(const TileShape& shape, const uint8_t* const* tile, int tiles,
                                        int64_t stride, int64_t groups, const Ahead& ahead,
                                        const TokenBlock& block, float* acc) {
  for (int p = 0; p < tiles; ++p) {
    for (int64_t t = 0; t < block.count; ++t) store(acc + (p * kTokenBlock + t) * kTileRows, zero());
  }
  // Two row tiles are two streams: behind the end of one's groups begins what the other has just read.
  const bool apart = tiles == 2 && tile[1] - tile[0] >= groups * stride;
  const int64_t distance = kPrefetchMany / stride;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t far = (apart && g + distance >= groups ? distance + groups : distance) * stride;
#if defined(FLASHMOE_PAIRED_TILES)
    if (tiles == 2 && block.count > 1 && block.x->rows.codes != nullptr) {
      const Tile both[2] = {tile_and_ahead(tile[0] + g * stride, shape, ahead, far),
                            tile_and_ahead(tile[1] + g * stride, shape, ahead, far)};
      add_pair_int8(both, shape, block, groups, g, acc);
      continue;
    }
#endif
    for (int p = 0; p < tiles; ++p) {
      const Tile now = tile_and_ahead(tile[p] + g * stride, shape, ahead, far);
      float* sums = acc + p * kTokenBlock * kTileRows;
      if (block.x->rows.codes != nullptr) {
        add_group_int8(now, shape, block, groups, g, sums);
      } else {
        add_group_f32(now, shape, block, groups, g, sums);
      }
    }
  }
}

#if !defined(FLASHMOE_SANITIZED)
// Four-bit codes with a table.
__attribute__((noinline)) void multiply_table_block(const TileMatrix& w, const TileShape& of,
                                                    const uint8_t* const* tile, int tiles, const Ahead& ahead,
                                                    const TokenBlock& block, float* acc) {
  if (of.group == 64) {
    const TileShape shape{4, 64, of.payload, of.f16, of.table};
    return tiles_times_tokens(shape, tile, tiles, w.tile_stride, w.groups, ahead, block, acc);
  }
  const TileShape shape{4, 32, of.payload, of.f16, of.table};
  tiles_times_tokens(shape, tile, tiles, w.tile_stride, w.groups, ahead, block, acc);
}
#endif

// Calls `function` with what is left of its arguments after the shape, a constant one for each codec.
#define FLASHMOE_FOR_SHAPE(function, ...)         \
  FLASHMOE_SHAPE_OF(4, 64, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(4, 32, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(8, 64, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(8, 32, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(6, 64, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(6, 32, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(3, 64, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(3, 32, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(2, 64, function, __VA_ARGS__) \
  FLASHMOE_SHAPE_OF(2, 32, function, __VA_ARGS__)
#define FLASHMOE_SHAPE_OF(b, g, function, ...)                                 \
  if (kSpecialised && w.bits == b && w.group == g) {                           \
    const TileShape shape{b, g, kTileRows * g * b / 8, w.f16_scales, nullptr}; \
    return function(shape, __VA_ARGS__);                                       \
  }

#include "kernels/quant/few-inl.h"

// Constant bits and group let the compiler unroll the unpacking and keep the codes in registers.
__attribute__((noinline)) void multiply_block(const TileMatrix& w, const uint8_t* const* tile, int tiles,
                                              const Ahead& ahead, const TokenBlock& block, float* acc) {
  alignas(64) uint8_t table[kTableNbytes];
#if !defined(FLASHMOE_SANITIZED)
  if (kSpecialised && w.has_table) {
    repeat_table(w, table);
    const TileShape shape{4, w.group, kTileRows * w.group / 2, w.f16_scales, table};
    return multiply_table_block(w, shape, tile, tiles, ahead, block, acc);
  }
  FLASHMOE_FOR_SHAPE(tiles_times_tokens, tile, tiles, w.tile_stride, w.groups, ahead, block, acc)
  if (kSpecialised) return;  // those are all codecs: the lines below would unroll every branch of each
#endif
  const TileShape shape = tile_shape(w, table);
  tiles_times_tokens(shape, tile, tiles, w.tile_stride, w.groups, ahead, block, acc);
}

FLASHMOE_INLINE int64_t rows_of(const TileMatrix& w, int64_t rt) {
  return w.rows - rt * kTileRows < kTileRows ? w.rows - rt * kTileRows : kTileRows;
}

FLASHMOE_INLINE float* out_row(const TokenRows& tokens, int64_t token, float* out, int64_t out_stride) {
  return out + (tokens.out != nullptr ? tokens.out[token] : token) * out_stride;
}

FLASHMOE_INLINE TokenBlock token_block(const Activations& x, int64_t first) {
  const int64_t left = x.tokens - first;
  return {&x, first, left < kTokenBlock ? left : kTokenBlock};
}

// Results of `tiles` row tiles for a block's tokens: acc [tiles, between, 16] to the rows of out.  Rows are
// far apart: without the prefetch each waits for its line, 5 % of a product with 512 tokens.
FLASHMOE_INLINE void write_block(const TileMatrix& w, const TokenRows& tokens, const TokenBlock& block,
                                 int64_t rt, int64_t tiles, const float* acc, int64_t between, float* out,
                                 int64_t out_stride) {
  for (int64_t t = 0; t < block.count; ++t) {
    if (t + kWriteAhead < block.count) {
      const float* next = out_row(tokens, block.first + t + kWriteAhead, out, out_stride) + rt * kTileRows;
      for (int64_t p = 0; p < tiles; ++p) __builtin_prefetch(next + p * kTileRows, 1);
    }
    float* row = out_row(tokens, block.first + t, out, out_stride) + rt * kTileRows;
    for (int64_t p = 0; p < tiles; ++p) {
      F32x16 y = load(acc + (p * between + t) * kTileRows);
      const int64_t rows = rows_of(w, rt + p);
      if (w.bias != nullptr) y = add(y, load_n(w.bias + (rt + p) * kTileRows, rows));
      float* to = row + p * kTileRows;
      if (tokens.weight != nullptr) y = fma(set1(tokens.weight[block.first + t]), y, load_n(to, rows));
      store_n(to, y, rows);
    }
  }
}

// Row tiles [begin, end), at most kTilesWritten, times one block of tokens; acc: room for [kTilesWritten,
// kTokenBlock, 16].
FLASHMOE_INLINE void matmul_block(const TileMatrix& w, const TokenRows& tokens, const TokenBlock& block,
                                  const Ahead& ahead, int64_t begin, int64_t end, float* acc, float* out,
                                  int64_t out_stride) {
  if (few(w, block)) {
    multiply_few(w, 1, begin, end, ahead, block, acc);
    return write_block(w, tokens, block, begin, end - begin, acc, kFew, out, out_stride);
  }
  // Few tokens wait for memory, and one stream of it is faster than two 18 KiB apart (22 against 12 GB/s).
  const int64_t together = block.x->tokens < 4 ? 1 : 2;
  for (int64_t rt = begin; rt < end; rt += together) {
    const int tiles = static_cast<int>(end - rt < together ? end - rt : together);
    const uint8_t* tile[2] = {w.tiles + rt * w.groups * w.tile_stride,
                              w.tiles + (rt + 1) * w.groups * w.tile_stride};
    multiply_block(w, tile, tiles, ahead, block, acc + (rt - begin) * kTokenBlock * kTileRows);
  }
  write_block(w, tokens, block, begin, end - begin, acc, kTokenBlock, out, out_stride);
}

void matmul(const TileMatrix& w, const Activations& x, const TokenRows& tokens, int64_t tile_begin,
            int64_t tile_end, float* out, int64_t out_stride) {
  alignas(64) float acc[kTilesWritten * kTokenBlock * kTileRows];
  const Ahead ahead = ahead_of(w, tile_end);
  for (int64_t first = 0; first < x.tokens; first += kTokensKept) {
    const int64_t last = x.tokens - first < kTokensKept ? x.tokens : first + kTokensKept;
    for (int64_t begin = tile_begin; begin < tile_end; begin += kTilesWritten) {
      const int64_t end = tile_end - begin < kTilesWritten ? tile_end : begin + kTilesWritten;
      for (int64_t token = first; token < last; token += kTokenBlock) {
        matmul_block(w, tokens, token_block(x, token), ahead, begin, end, acc, out, out_stride);
      }
    }
  }
}

// Of 16 rows from `row` on; biases are padded to whole row tiles.
FLASHMOE_INLINE F32x16 joined(const Glu& glu, int64_t row, F32x16 gate, F32x16 up) {
  if (glu.gate_bias != nullptr) {
    gate = add(gate, load(glu.gate_bias + row));
    up = add(up, load(glu.up_bias + row));
  }
  if (glu.limit == 0.0f) return mul(silu(gate), up);
  // min and max give their second operand when one is NaN: in this order a NaN goes through.
  const F32x16 g = min(set1(glu.limit), gate);
  const F32x16 u = max(set1(-glu.limit), min(set1(glu.limit), up));
  const F32x16 closed = add(set1(1.0f), exp(sub(zero(), mul(set1(glu.alpha), g))));
  return mul(add(u, set1(1.0f)), div(g, closed));
}

// Gate and up of row tiles [begin, end) become one; acc: [end - begin, 2, between, 16] to [end - begin,
// between, 16].
FLASHMOE_INLINE void join_tiles(const Glu& glu, const TokenBlock& block, int64_t begin, int64_t end,
                                int64_t between, float* acc) {
  for (int64_t i = 0; i < end - begin; ++i) {
    for (int64_t t = 0; t < block.count; ++t) {
      const float* gate = acc + (2 * i * between + t) * kTileRows;
      const F32x16 up = load(gate + between * kTileRows);
      store(acc + (i * between + t) * kTileRows, joined(glu, (begin + i) * kTileRows, load(gate), up));
    }
  }
}

void matmul_glu(const TileMatrix& w, const Glu& glu, const Activations& x, const TokenRows& tokens,
                int64_t tile_begin, int64_t tile_end, float* out, int64_t out_stride) {
  static_assert(kTilesWritten * kFew <= kTokenBlock);
  alignas(64) float acc[2 * kTokenBlock * kTileRows];
  const Ahead ahead = ahead_of(w, tile_end);
  for (int64_t first = 0; first < x.tokens; first += kTokenBlock) {
    const TokenBlock block = token_block(x, first);
    const bool is_few = few(w, block);
    // One token's row tiles are joined some at a time: after each, nothing was read for 700 cycles.
    const int64_t together = is_few ? kTilesWritten : 1, between = is_few ? kFew : kTokenBlock;
    for (int64_t begin = tile_begin; begin < tile_end; begin += together) {
      const int64_t end = tile_end - begin < together ? tile_end : begin + together;
      if (is_few) {
        multiply_few(w, 2, begin, end, ahead, block, acc);
      } else {
        const uint8_t* gate = w.tiles + begin * w.groups * w.tile_stride;
        const uint8_t* tile[2] = {gate, gate + w.tile_stride / 2};
        multiply_block(w, tile, 2, ahead, block, acc);
      }
      join_tiles(glu, block, begin, end, between, acc);
      write_block(w, tokens, block, begin, end - begin, acc, between, out, out_stride);
    }
  }
}
