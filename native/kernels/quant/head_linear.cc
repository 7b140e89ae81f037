// A product for each head with rows of its own: the two absorbed projections of latent attention.
#include <algorithm>

#include "flashmoe/quant_ops.h"

namespace flashmoe {

namespace {

// A head's rows of a tile matrix.
TileMatrix head_tiles(const TileMatrix& w, int64_t head, int64_t rows) {
  TileMatrix part = w;
  part.tiles += head * (rows / kTileRows) * w.groups * w.tile_stride;
  part.rows = rows;
  if (w.bias != nullptr) part.bias += head * rows;
  return part;
}

DenseMatrix head_rows(const DenseMatrix& w, int64_t head, int64_t rows) {
  const int64_t size = w.type == DenseMatrix::Type::f32 ? 4 : 2;
  DenseMatrix part = w;
  part.data = static_cast<const uint8_t*>(w.data) + head * rows * w.cols * size;
  part.rows = rows;
  if (w.bias != nullptr) part.bias += head * rows;
  return part;
}

}  // namespace

void QuantOps::head_linear(const float* x, int64_t tokens, int64_t heads, int64_t x_width,
                           const Matrix& weight, float* out, int64_t out_width, bool precise) {
  const int64_t x_step = heads * x_width, out_step = heads * out_width;
  if (const auto* dense = std::get_if<DenseMatrix>(&weight)) {
    const int64_t rows = dense->rows / heads;
    pool_.parallel_for(heads, [&](int64_t h) {
      const DenseMatrix part = head_rows(*dense, h, rows);
      for (int64_t t = 0; t < tokens; ++t) {
        kernels_.dense(part, x + t * x_step + h * x_width, 0, rows, out + t * out_step + h * out_width);
      }
    });
    return;
  }
  const TileMatrix& w = std::get<TileMatrix>(weight);
  const int64_t rows = w.rows / heads, cols = w.groups * w.group, values = tokens * cols;
  const int64_t room = tasks_of(values, 64) * 64;  // of a head: cache lines of its own
  if (int8_) {
    head_planes_.reserve(heads * room);
  } else {
    head_rows_.at_least(heads * (room + room / 32));
  }
  pool_.parallel_for(heads, [&](int64_t h) {
    Activations input;
    if (int8_) {
      const PlaneRows planes = head_planes_.rows(h * room, tokens);
      quantize_rows(kernels_, {x + h * x_width, x_step, cols, w.group, kCoarseLimit, precise}, planes);
      input = activations_of(planes, precise, cols);
    } else {
      float* own = head_rows_.data() + h * (room + room / 32);
      for (int64_t t = 0; t < tokens; ++t) {
        std::copy_n(x + t * x_step + h * x_width, cols, own + t * cols);
        kernels_.group_sums(own + t * cols, cols, w.group, t, tokens, own + values);
      }
      input.x = own;
      input.sums = own + values;
      input.tokens = tokens;
      input.cols = cols;
    }
    // A block of tokens at a time: their planes are still in the first-level caches.
    kernels_.matmul(head_tiles(w, h, rows), input, {nullptr, nullptr}, 0, rows / kTileRows,
                    out + h * out_width, out_step);
  });
}

}  // namespace flashmoe
