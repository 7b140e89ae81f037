// The output head: a product with the whole vocabulary, exact where it decides.
#include <algorithm>
#include <array>
#include <utility>

#include "flashmoe/quant_ops.h"

namespace flashmoe {

namespace {

static_assert(kTileRows % 4 == 0);

float largest_of_tile(const float* y, int64_t rows) {
  if (rows < kTileRows) return *std::max_element(y, y + rows);
  float lane[4] = {y[0], y[1], y[2], y[3]};
  for (int64_t r = 4; r < kTileRows; r += 4) {
    for (int i = 0; i < 4; ++i) lane[i] = std::max(lane[i], y[r + i]);
  }
  return std::max(std::max(lane[0], lane[1]), std::max(lane[2], lane[3]));
}

// Up to kSureTiles row tiles with the largest values of y [rows]; of equal ones the first.
class LargestTiles {
 public:
  LargestTiles(const float* y, int64_t rows) {
    for (int64_t tile = 0; tile * kTileRows < rows; ++tile) {
      const float* at = y + tile * kTileRows;
      offer(largest_of_tile(at, std::min(kTileRows, rows - tile * kTileRows)), tile);
    }
  }

  // Ascending, so that the matrix is read in its order.
  std::span<const int64_t> ordered() {
    for (int64_t i = 0; i < count_; ++i)
      tiles_[static_cast<size_t>(i)] = kept_[static_cast<size_t>(i)].second;
    std::sort(tiles_.begin(), tiles_.begin() + count_);
    return {tiles_.data(), static_cast<size_t>(count_)};
  }

 private:
  using Kept = std::pair<float, int64_t>;

  // The order of a heap whose front leaves first: the smallest, of equal ones the last.
  static bool stays(const Kept& a, const Kept& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  }

  void offer(float value, int64_t tile) {
    if (value != value) return;  // a broken token: nothing is larger than anything else
    const auto begin = kept_.begin();
    if (count_ < kSureTiles) {
      kept_[static_cast<size_t>(count_++)] = {value, tile};
      std::push_heap(begin, begin + count_, stays);
    } else if (value > kept_.front().first) {
      std::pop_heap(begin, begin + count_, stays);
      kept_[static_cast<size_t>(count_ - 1)] = {value, tile};
      std::push_heap(begin, begin + count_, stays);
    }
  }

  std::array<Kept, kSureTiles> kept_;
  std::array<int64_t, kSureTiles> tiles_;
  int64_t count_ = 0;
};

}  // namespace

void QuantOps::logits(const float* x, int64_t tokens, int64_t cols, const Matrix& weight, float* out) {
  multiply({x, cols, cols, 0, kCoarseLimit, true}, tokens, {&weight, 1}, {&out, 1}, false);
  const auto* w = std::get_if<TileMatrix>(&weight);
  if (w == nullptr || !int8_) return;  // no planes to be had
  const TokenInput& input = linear_input_[w->group == 64 ? 1 : 0];
  const int64_t room = tasks_of(cols, 64) * 64;
  gathered_planes_.reserve(tokens * room);
  pool_.parallel_for(tokens, [&](int64_t t) {
    const PlaneRows planes = gathered_planes_.rows(t * room, 1);
    const int32_t token = static_cast<int32_t>(t);
    input.gather({&token, 1}, true, planes);
    const Activations own = activations_of(planes, true, cols);
    float* y = out + t * w->rows;
    LargestTiles largest(y, w->rows);
    for (const int64_t tile : largest.ordered()) {
      kernels_.matmul(*w, own, {nullptr, nullptr}, tile, tile + 1, y, w->rows);
    }
  });
}

}  // namespace flashmoe
