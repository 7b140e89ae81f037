// Matrix products with tile-quantised weights: the shapes, and the table of functions per instruction set.
//
// A tile is 16 rows x `group` columns (docs/format.md); matrix tiles follow one another row tile by row
// tile.  All functions are pure: no allocation, no state, any number of threads at once.
//
// Arithmetic of every function, the same in every instruction set and for every number of tokens, g
// ascending:
//   int8 path:  x ~ scale * (high + low / 128), two int8 planes; the low one counts in groups marked fine
//   only.
//               acc = fma(float(sum q*high), s_rg * xs_g, acc);  acc = fma(b_rg, xsum_g, acc);
//               if fine: acc = fma(float(sum q*low), s_rg * (xs_g / 128), acc)
//   (a code stands for itself or, in a matrix with a table, for its entry there)
//   f32 path:   d = fma over the group's columns ascending of q * x;  acc = fma(s_rg, d, acc);
//               acc = fma(b_rg, xsum_g, acc)
// Integer sums are exact: at most 64 * 255 * 127 = 2.1e6.  xsum_g is the sum of the quantised values, so that
// the rounding errors of both terms cancel as far as a weight's code and bias do (docs/experiments.md).
#pragma once

#include <cstdint>

#include "flashmoe/cpu.h"

namespace flashmoe {

constexpr int64_t kTileRows = 16;
constexpr int64_t kMaxGroups = 2048;  // of one row; 65,536 columns in groups of 32

struct TileMatrix {
  const uint8_t* tiles = nullptr;
  int64_t rows = 0;
  int64_t groups = 0;       // tiles per row tile
  int64_t tile_stride = 0;  // bytes from one tile of a row tile to the next (two tiles when interleaved)
  int bits = 4;             // 2, 3, 4, 6 or 8
  int group = 64;           // columns of a tile: 32 or 64
  bool f16_scales = false;  // bf16 otherwise
  // What the caller reads after the tiles of a call, to be asked for in time; null: what follows them.
  const uint8_t* after = nullptr;
  const float* bias = nullptr;  // of each row, added to its result; null: none
  // 4 bit only: code c stands for table[c], at most 127; the scale and the bias of a group apply to that.
  bool has_table = false;
  uint8_t table[16] = {};

  int64_t tile_nbytes() const { return kTileRows * group * bits / 8 + 4 * kTileRows; }
  int64_t row_tiles() const { return (rows + kTileRows - 1) / kTileRows; }
};

// Tokens of one pass over a tile: the accumulators of two tiles are 8 KiB of the first-level cache.
constexpr int64_t kTokenBlock = 64;

// Where group g of a token stands in the planes: blocks of kTokenBlock tokens (the last one may be shorter),
// in each group by group, so that the tokens of a group are neighbours and a block is one piece.  Rows of
// 4 KiB, or groups 32 KiB apart, would all fall into the same few sets of the caches.
inline int64_t plane_index(int64_t groups, int64_t tokens, int64_t token, int64_t g) {
  const int64_t first = token / kTokenBlock * kTokenBlock, left = tokens - first;
  return first * groups + g * (left < kTokenBlock ? left : kTokenBlock) + (token - first);
}

// Where the rows of a group begin that a block's tokens bring to its products: `count` high planes in the
// order of the tokens, then room for `count` low planes, those that count first.  A product takes as many of
// these neighbours as it needs; low planes that lay elsewhere cost it twice their number in multiplications.
inline int64_t first_row(int64_t groups, int64_t first_token, int64_t count, int64_t g) {
  return 2 * (first_token * groups + g * count);
}

// Activations of some tokens as the integer products read them; arrays of two rows a token and group are
// indexed by first_row, `fine` and `low_at` by plane_index, `marked` by block * groups + group.
struct PlaneRows {
  int8_t* codes = nullptr;    // `group` bytes a row
  float* scale = nullptr;     // of a low plane: that of its high one / 128
  float* sum = nullptr;       // with the low plane where fine; 0 for a low plane
  float* fine_sum = nullptr;  // with the low plane, where it was made; 0 for a low plane
  uint8_t* token = nullptr;   // of the block
  uint8_t* fine = nullptr;    // the low plane counts
  uint8_t* low_at = nullptr;  // which of the low planes is the token's, where it was made
  uint8_t* marked = nullptr;  // low planes that count
  int64_t tokens = 0;
};

// Activations of some tokens.
struct Activations {
  PlaneRows rows;               // int8 path; its codes are null on the f32 path
  bool precise = false;         // low planes count everywhere
  const float* x = nullptr;     // [tokens, cols], f32 path
  const float* sums = nullptr;  // f32 path, indexed by plane_index
  int64_t tokens = 0;
  int64_t cols = 0;
};

// Activations before they are quantised.
struct FloatRows {
  const float* x = nullptr;
  int64_t stride = 0;  // floats from one token to the next
  int64_t cols = 0;    // a multiple of group
  int group = 64;
  float coarse_limit = 0.0f;
  bool every = false;  // low planes that do not count are made too, behind those that do
};

// Where the results of a product go, for each token of the activations.
struct TokenRows {
  const int32_t* out = nullptr;   // output row of token i; null: i
  const float* weight = nullptr;  // null: out = y;  else out = fma(weight[i], y, out)
};

struct DenseMatrix {
  const void* data = nullptr;  // row-major [rows, cols]
  int64_t rows = 0;
  int64_t cols = 0;
  enum class Type { f32, bf16, f16 } type = Type::f32;
  const float* bias = nullptr;  // of each row; null: none
};

// What joins gate and up.  limit 0: silu(g) * u.  Else, with g at most limit and u within +-limit:
// (u + 1) * g * sigmoid(alpha * g).
struct Glu {
  float alpha = 0.0f;
  float limit = 0.0f;
  const float* gate_bias = nullptr;  // of each row, added first; both or none
  const float* up_bias = nullptr;
};

constexpr int64_t kPeakMultiplyAdds = 1024 * 12;  // of one round of multiply_registers

struct QuantKernels {
  // The planes of groups [begin, end) of the block of tokens that starts with `first`: high = round(x /
  // scale) with scale = amax / 127, low = round(128 * the rest); fine where amax exceeds coarse_limit times
  // the root mean square of the token's row.
  void (*quantize)(const FloatRows& x, int64_t first, int64_t begin, int64_t end, const PlaneRows& out);
  // Group sums alone, for the f32 path: sum[plane_index].
  void (*group_sums)(const float* x, int64_t cols, int group, int64_t token, int64_t tokens, float* sum);
  // Rows [16 * tile_begin, 16 * tile_end) of W x for each token; out rows are out_stride floats apart.
  void (*matmul)(const TileMatrix& w, const Activations& x, const TokenRows& tokens, int64_t tile_begin,
                 int64_t tile_end, float* out, int64_t out_stride);
  // glu(gate x, up x), tiles of gate and up alternating in `gate_up.tiles` (gate first).
  void (*matmul_glu)(const TileMatrix& gate_up, const Glu& glu, const Activations& x, const TokenRows& tokens,
                     int64_t tile_begin, int64_t tile_end, float* out, int64_t out_stride);
  // Row `row` of W as floats: scale * code + bias of its group (rounded after the product, as dequantisation
  // is defined).
  void (*dequantize_row)(const TileMatrix& w, int64_t row, float* out);
  // Rows [row_begin, row_end) of an unquantised W for one token.
  void (*dense)(const DenseMatrix& w, const float* x, int64_t row_begin, int64_t row_end, float* out);
  // out[i] = fma(weight, y[i], out[i]) for i < n.
  void (*accumulate)(float weight, const float* y, int64_t n, float* out);
  // out[i] = 1 / (1 + exp(-x[i])) for i < n.
  void (*sigmoid)(const float* x, int64_t n, float* out);
  // Reads every cache line of [data, data + nbytes) once, nbytes % 64 == 0; the result only keeps the reads
  // alive.
  uint32_t (*read_all)(const uint8_t* data, int64_t nbytes);
  // `rounds` times kPeakMultiplyAdds integer multiply-adds between registers: what matmul could do at most.
  // The result only keeps them alive.
  uint32_t (*multiply_registers)(int64_t rounds);
};

const QuantKernels& quant_kernels_scalar();
const QuantKernels& quant_kernels_avx2();
const QuantKernels& quant_kernels_avxvnni();
const QuantKernels& quant_kernels_avx512vl();
const QuantKernels& quant_kernels_avx512vnni();
const QuantKernels& quant_kernels_neon();
const QuantKernels& quant_kernels_dotprod();
const QuantKernels& quant_kernels_i8mm();

// Table of `isa`; throws std::invalid_argument when it is not compiled in.
const QuantKernels& quant_kernels(Isa isa);

}  // namespace flashmoe
