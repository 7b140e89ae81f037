// Tiles times one token, with AVX-512 up to three; part of matmul-inl.h.
//
// Their sums stay in registers from the first group to the last.  Through memory, as for many tokens, each
// group waits for the store of the one before: one token took 50 cycles a group where its products and its
// unpacking need 25.

// Tokens; with half the registers only one has room.
#if defined(FLASHMOE_PAIRED_TILES)
constexpr int kFew = 3;
#else
constexpr int kFew = 1;
#endif
constexpr int kFewRows = kFew < 2 ? 2 : kFew;  // one token has two where its low plane counts
// Bytes ahead, of several tokens and of one: ten tiles; and from one line of a tile to the other.
constexpr int64_t kPrefetchFew = 9216, kShownAhead = 5760, kShownApart = 256;

// As group_dots, for at most kFewRows rows.
FLASHMOE_INLINE void few_dots(const uint8_t* codes, const TileShape& shape, const int8_t* x, int n,
                              I32x16* d) {
#if defined(FLASHMOE_WIDE_CODES)
  if (shape.bits == 4 && shape.table == nullptr) {
    // The upper four bits are multiplied where they stand, as sixteen times their code: a shift a group, not
    // one for each 64 bytes.
    const int chains = n == 1 ? 2 : 1;
    I32x16 low[kFewRows], high[kFewRows];
    FLASHMOE_UNROLL(3)
    for (int j = 0; j < n * chains; ++j) low[j] = high[j] = i32_zero();
    FLASHMOE_UNROLL(8)
    for (int i = 0; i < shape.group / 8; ++i) {
      const U8x64 both = u8_load_once(codes + 64 * i);
      const U8x64 first = u8_and(both, 0x0f), second = u8_and(both, 0xf0);
      FLASHMOE_UNROLL(3)
      for (int j = 0; j < n; ++j) {
        const int at = j * chains + i % chains;
        low[at] = dot4_at(low[at], first, 8, x + j * shape.group + 8 * i);
        high[at] = dot4_at(high[at], second, 8, x + j * shape.group + 8 * i + 4);
      }
    }
    FLASHMOE_UNROLL(3)
    for (int j = 0; j < n; ++j) {
      const I32x16 l = chains == 1 ? low[j] : i32_add(low[0], low[1]);
      const I32x16 h = chains == 1 ? high[j] : i32_add(high[0], high[1]);
      d[j] = i32_add(l, i32_sixteenth(h));
    }
    return;
  }
#endif
  group_dots(codes, shape, x, n, d);
}

// n rows of the group at `codes`; row j adds to total[j], or all to total[0].
FLASHMOE_INLINE void add_few(const uint8_t* codes, const TileShape& shape, const GroupRows& rows, int n,
                             bool one_token, F32x16* total) {
  const int8_t* x = rows.codes;
  // Keeps the unpacking of one row and of two apart: made before the branch for both, it filled the
  // scheduler, and the next group waited for this one's sums.
  asm volatile("" : "+r"(x), "+r"(codes));
  I32x16 d[kFewRows];
  few_dots(codes, shape, x, n, d);
  // The scales stand behind the codes and are read behind them: read first, they broke the ascending order
  // that the processor's prefetcher follows, and one token got 75 % of the bandwidth instead of 89.
  asm volatile("" : "+r"(codes));
  const Tile tile = tile_at(codes, shape);
  FLASHMOE_UNROLL(3)
  for (int j = 0; j < n; ++j) {
    F32x16& sum = total[one_token ? 0 : j];
    sum = fma(to_f32(d[j]), mul(tile.scales, set1(rows.scale[j])), sum);
    sum = fma(tile.biases, set1(rows.sum[j]), sum);
  }
}

// The low planes of a group with several tokens; few groups have one, and their order is known at run time
// only.
FLASHMOE_INLINE void add_low_rows(const Tile& tile, const TileShape& shape, const GroupRows& rows, int n,
                                  F32x16* total) {
  alignas(64) float sums[kFew * kTileRows];
  for (int t = 0; t < n; ++t) store(sums + t * kTileRows, total[t]);
  for (int64_t r = n; r < rows.count; ++r) add_rows(tile, shape, rows, r, 1, sums);
  for (int t = 0; t < n; ++t) total[t] = load(sums + t * kTileRows);
}

// Asks for what follows the tile at an address.  For one token the processor itself runs ahead of a stream
// that it need not wait for: asking for every line took a third of 65 GB/s, while two lines of a tile show it
// the way, past the ends of pages and on to what a thread reads next, and bring experts 4 %.  Two tokens are
// slow enough to be waited for: without asking they read 19 GB/s instead of 25.
FLASHMOE_INLINE void look_ahead(const uint8_t* at, const TileShape& shape, const Ahead& ahead, int n) {
  const uint8_t* target = at + (n > 1 ? kPrefetchFew : kShownAhead);
  if (target >= ahead.end) target += ahead.skip;
  if (n > 1) return prefetch_tile(target, shape);
  __builtin_prefetch(target, 0, kSecondLevel);
  __builtin_prefetch(target + kShownApart, 0, kSecondLevel);
}

// Sums of one row tile's n tokens (block.count); `tiles`: 1, or 2 for gate and up, which alternate.  Both are
// constant.  acc: [tiles, kFew, 16].
FLASHMOE_INLINE void row_tile_times_n(const uint8_t* at, int tiles, int n, const TileMatrix& w,
                                      const Ahead& ahead, const TileShape& shape, const TokenBlock& block,
                                      float* acc) {
  F32x16 total[2][kFew];
  FLASHMOE_UNROLL(2)
  for (int p = 0; p < tiles; ++p) {
    FLASHMOE_UNROLL(3)
    for (int t = 0; t < n; ++t) total[p][t] = zero();
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    const GroupRows rows = group_rows(block, shape, w.groups, g);
    FLASHMOE_UNROLL(2)
    for (int p = 0; p < tiles; ++p) {
      const uint8_t* now = at + g * w.tile_stride + p * (w.tile_stride / 2);
      look_ahead(now, shape, ahead, n);
      if (n == 1 && rows.count == 2) {
        add_few(now, shape, rows, 2, true, total[p]);
        continue;
      }
      add_few(now, shape, rows, n, false, total[p]);
      if (n > 1 && rows.count > n) add_low_rows(tile_at(now, shape), shape, rows, n, total[p]);
    }
  }
  FLASHMOE_UNROLL(2)
  for (int p = 0; p < tiles; ++p) {
    FLASHMOE_UNROLL(3)
    for (int t = 0; t < n; ++t) store(acc + (p * kFew + t) * kTileRows, total[p][t]);
  }
}

// Row tiles [begin, end), one stretch of memory.  acc: [end - begin, tiles, kFew, 16].
FLASHMOE_INLINE void rows_times_few(const TileShape& shape, const TileMatrix& w, int tiles, int64_t begin,
                                    int64_t end, const Ahead& ahead, const TokenBlock& block, float* acc) {
#define FLASHMOE_FEW(many, n)                                                                          \
  if (n <= kFew && tiles == many && block.count == n) {                                                \
    for (int64_t rt = begin; rt < end; ++rt, acc += many * kFew * kTileRows) {                         \
      row_tile_times_n(w.tiles + rt * w.groups * w.tile_stride, many, n, w, ahead, shape, block, acc); \
    }                                                                                                  \
    return;                                                                                            \
  }
  FLASHMOE_FEW(1, 1)
  FLASHMOE_FEW(2, 1)
  FLASHMOE_FEW(1, 2)
  FLASHMOE_FEW(2, 2)
  FLASHMOE_FEW(1, 3)
  FLASHMOE_FEW(2, 3)
#undef FLASHMOE_FEW
}

// Whether multiply_few takes it.  With all low planes several tokens are many rows.
FLASHMOE_INLINE bool few(const TileMatrix& w, const TokenBlock& block) {
  const bool rows = block.count == 1 || (block.count <= kFew && !block.x->precise);
  return kSpecialised && rows && !w.has_table && block.x->rows.codes != nullptr;
}

// A function of its own: beside the loops for many tokens the compiler made those 5 % slower.
__attribute__((noinline)) void multiply_few(const TileMatrix& w, int tiles, int64_t begin, int64_t end,
                                            const Ahead& ahead, const TokenBlock& block, float* acc) {
#if defined(FLASHMOE_SANITIZED)
  alignas(64) uint8_t table[kTableNbytes];
  rows_times_few(tile_shape(w, table), w, tiles, begin, end, ahead, block, acc);
#else
  FLASHMOE_FOR_SHAPE(rows_times_few, w, tiles, begin, end, ahead, block, acc)
#endif
}
