// Two tiles times tokens where registers are many (AVX-512); part of matmul-inl.h.
//
// Four values of an activation are broadcast once and meet both tiles from the register.  With the broadcast
// inside the product each product is a load too, and two loads a cycle are all there are: the load ports
// were as busy as the multipliers.

// Marked tokens whose low planes are taken together: their rows are not neighbours, each needs an address.
constexpr int kLowTogether = 4;

// Exact integer products of one group of two tiles with n rows of activations.
FLASHMOE_INLINE void pair_dots(const uint8_t* const* codes, const TileShape& shape, const int8_t* const* x,
                               int n, I32x16 (*d)[kTogether]) {
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
      const I32x16 x4 = broadcast4(x[j] + 4 * i);
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

// The low planes of n tokens, `token` their places in the block.
FLASHMOE_INLINE void add_pair_low(const Tile* tile, const TileShape& shape, const GroupRows& rows,
                                  const int64_t* token, int n, float* acc) {
  const uint8_t* const codes[2] = {tile[0].codes, tile[1].codes};
  const int8_t* x[kTogether];
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j) x[j] = rows.low + token[j] * shape.group;
  I32x16 d[2][kTogether];
  pair_dots(codes, shape, x, n, d);
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j) {
    PairSums sums(acc + token[j] * kTileRows);
    sums.first = add_low(sums.first, d[0][j], tile[0].scales, rows.scale[token[j]]);
    sums.second = add_low(sums.second, d[1][j], tile[1].scales, rows.scale[token[j]]);
    sums.put();
  }
}

// n tokens from the t-th on.
FLASHMOE_INLINE void add_pair_tokens(const Tile* tile, const TileShape& shape, const GroupRows& rows,
                                     int64_t t, int n, bool precise, float* acc) {
  const uint8_t* const codes[2] = {tile[0].codes, tile[1].codes};
  const int8_t* x[kTogether];
  int64_t token[kTogether];
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j) {
    token[j] = t + j;
    x[j] = rows.high + (t + j) * shape.group;
  }
  I32x16 d[2][kTogether];
  pair_dots(codes, shape, x, n, d);
  FLASHMOE_UNROLL(8)
  for (int j = 0; j < n; ++j) {
    PairSums sums(acc + (t + j) * kTileRows);
    const F32x16 scale = set1(rows.scale[t + j]), sum = set1(rows.sum[t + j]);
    sums.first = fma(tile[0].biases, sum, fma(to_f32(d[0][j]), mul(tile[0].scales, scale), sums.first));
    sums.second = fma(tile[1].biases, sum, fma(to_f32(d[1][j]), mul(tile[1].scales, scale), sums.second));
    sums.put();
  }
  if (precise) add_pair_low(tile, shape, rows, token, n, acc);
}

// As add_pair_tokens, with n known at run time only.
FLASHMOE_INLINE void add_pair_batch(const Tile* tile, const TileShape& shape, const GroupRows& rows,
                                    int64_t t, int n, bool precise, float* acc) {
  static_assert(kTogether == 8);
  switch (n) {
    case 1:
      return add_pair_tokens(tile, shape, rows, t, 1, precise, acc);
    case 2:
      return add_pair_tokens(tile, shape, rows, t, 2, precise, acc);
    case 3:
      return add_pair_tokens(tile, shape, rows, t, 3, precise, acc);
    case 4:
      return add_pair_tokens(tile, shape, rows, t, 4, precise, acc);
    case 5:
      return add_pair_tokens(tile, shape, rows, t, 5, precise, acc);
    case 6:
      return add_pair_tokens(tile, shape, rows, t, 6, precise, acc);
    case 7:
      return add_pair_tokens(tile, shape, rows, t, 7, precise, acc);
    default:
      return add_pair_tokens(tile, shape, rows, t, 8, precise, acc);
  }
}

// The low planes of the tokens in `marked`.
FLASHMOE_INLINE void add_marked_low(const Tile* tile, const TileShape& shape, const GroupRows& rows,
                                    uint64_t marked, float* acc) {
  while (marked != 0) {
    int64_t token[kLowTogether];
    int n = 0;
    for (; n < kLowTogether && marked != 0; ++n, marked &= marked - 1) token[n] = __builtin_ctzll(marked);
    switch (n) {
      case 1:
        return add_pair_low(tile, shape, rows, token, 1, acc);
      case 2:
        return add_pair_low(tile, shape, rows, token, 2, acc);
      case 3:
        return add_pair_low(tile, shape, rows, token, 3, acc);
      default:
        add_pair_low(tile, shape, rows, token, kLowTogether, acc);
    }
  }
}

// acc[p][t] += one group's share of both tiles for every token of the block.
FLASHMOE_INLINE void add_pair_int8(const Tile* tile, const TileShape& shape, const TokenBlock& block,
                                   int64_t groups, int64_t g, float* acc) {
  const GroupRows rows = group_rows(block, shape, groups, g);
  int64_t t = 0;
  for (int64_t batches = (block.count + kTogether - 1) / kTogether; batches > 0; --batches) {
    const int64_t n = (block.count - t + batches - 1) / batches;
    add_pair_batch(tile, shape, rows, t, static_cast<int>(n), block.fine == nullptr, acc);
    t += n;
  }
  if (block.fine != nullptr && block.fine[g] != 0) add_marked_low(tile, shape, rows, block.fine[g], acc);
}
