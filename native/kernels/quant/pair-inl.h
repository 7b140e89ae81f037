// Two tiles times tokens where registers are many (AVX-512); part of matmul-inl.h.
//
// Four values of an activation are broadcast once and meet both tiles from the register.  With the broadcast
// inside the product each product is a load too, and two loads a cycle are all there are: the load ports
// were as busy as the multipliers.

// Exact integer products of one group of two tiles with n rows of activations.
FLASHMOE_INLINE void pair_dots(const uint8_t* const* codes, const TileShape& shape, const int8_t* x, int n,
                               I32x16 (*d)[kTogether]) {
  const int chains = n >= 4 ? 1 : n >= 2 ? 2 : 4;
  I32x16 sums[2][4 * kTogether];
  FLASHMOE_UNROLL(32)
  for (int j = 0; j < n * chains; ++j) sums[0][j] = sums[1][j] = i32_zero();
  FLASHMOE_UNROLL(16)
  for (int i = 0; i < shape.group / 4; ++i) {
    const U8x64 first = column_values(codes[0], shape, i);
    const U8x64 second = column_values(codes[1], shape, i);
    FLASHMOE_UNROLL(8)
    for (int j = 0; j < n; ++j) {
      const I32x16 x4 = broadcast4(x + j * shape.group + 4 * i);
      const int at = j * chains + i % chains;
      sums[0][at] = dot4_with(sums[0][at], first, x4);
      sums[1][at] = dot4_with(sums[1][at], second, x4);
    }
  }
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j) {
    for (int p = 0; p < 2; ++p) {
      const I32x16* part = sums[p] + j * chains;
      d[p][j] = part[0];
      if (chains == 2) d[p][j] = i32_add(part[0], part[1]);
      if (chains == 4) d[p][j] = i32_add(i32_add(part[0], part[1]), i32_add(part[2], part[3]));
    }
  }
}

// The two sums of one token.  Both are loaded before either is stored: they are 4 KiB apart, and a load
// waits for a store with the same low address bits.
struct PairSums {
  float* at;
  F32x16 first;
  F32x16 second;

  explicit PairSums(float* acc) : at(acc), first(load(acc)), second(load(acc + kTokenBlock * kTileRows)) {}
  void put() const {
    store(at, first);
    store(at + kTokenBlock * kTileRows, second);
  }
};

// n rows from the r-th on.
FLASHMOE_INLINE void add_pair_rows(const Tile* tile, const TileShape& shape, const GroupRows& rows, int64_t r,
                                   int n, float* acc) {
  const uint8_t* const codes[2] = {tile[0].codes, tile[1].codes};
  I32x16 d[2][kTogether];
  pair_dots(codes, shape, rows.codes + r * shape.group, n, d);
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j) {
    PairSums sums(acc + rows.token[r + j] * kTileRows);
    const F32x16 scale = set1(rows.scale[r + j]), sum = set1(rows.sum[r + j]);
    sums.first = fma(tile[0].biases, sum, fma(to_f32(d[0][j]), mul(tile[0].scales, scale), sums.first));
    sums.second = fma(tile[1].biases, sum, fma(to_f32(d[1][j]), mul(tile[1].scales, scale), sums.second));
    sums.put();
  }
}

// As add_pair_rows, with n known at run time only.
FLASHMOE_INLINE void add_pair_batch(const Tile* tile, const TileShape& shape, const GroupRows& rows,
                                    int64_t r, int n, float* acc) {
  static_assert(kTogether == 8);
  switch (n) {
    case 1:
      return add_pair_rows(tile, shape, rows, r, 1, acc);
    case 2:
      return add_pair_rows(tile, shape, rows, r, 2, acc);
    case 3:
      return add_pair_rows(tile, shape, rows, r, 3, acc);
    case 4:
      return add_pair_rows(tile, shape, rows, r, 4, acc);
    case 5:
      return add_pair_rows(tile, shape, rows, r, 5, acc);
    case 6:
      return add_pair_rows(tile, shape, rows, r, 6, acc);
    case 7:
      return add_pair_rows(tile, shape, rows, r, 7, acc);
    default:
      return add_pair_rows(tile, shape, rows, r, 8, acc);
  }
}

// acc[p][t] += one group's share of both tiles for every token of the block.
FLASHMOE_INLINE void add_pair_int8(const Tile* tile, const TileShape& shape, const TokenBlock& block,
                                   int64_t groups, int64_t g, float* acc) {
  const GroupRows rows = group_rows(block, shape, groups, g);
  int64_t r = 0;
  for (int64_t batches = (rows.count + kTogether - 1) / kTogether; batches > 0; --batches) {
    const int64_t n = (rows.count - r + batches - 1) / batches;
    add_pair_batch(tile, shape, rows, r, static_cast<int>(n), acc);
    r += n;
  }
}
