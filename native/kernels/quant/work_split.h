// How products are cut into tasks.  Depends on shapes only, never on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "flashmoe/quant_kernels.h"

namespace flashmoe {

// A task reads about this much weight data: large against the microsecond a task hand-over costs, small
// enough to balance the last ones.
constexpr int64_t kTaskNbytes = 32 * 1024;

inline int64_t tasks_of(int64_t items, int64_t per_task) { return (items + per_task - 1) / per_task; }

// Row tiles of a task, an even number for two tiles share their activations.  Many tokens make a task long
// anyway; then more tiles amortise what each task prepares.
inline int64_t tiles_per_task(const TileMatrix& w, int64_t tokens) {
  const int64_t by_size = kTaskNbytes / std::max<int64_t>(1, w.groups * w.tile_stride);
  return std::max<int64_t>(tokens >= 8 ? 4 : 1, by_size > 2 ? by_size / 2 * 2 : by_size);
}

}  // namespace flashmoe
