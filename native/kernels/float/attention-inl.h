// Attention over one block of keys with the maximum of that block (Milakov and Gimelshein, arXiv 1805.02867),
// and the sum of such parts; included once per instruction set.
//
// The rows of a tile are the query heads of one token that read the same keys: all see the same number of
// them, so no row computes what another needs.  Each element is one chain of fused multiply-adds, over the
// head's values for a score and over the keys for a result, whatever the tile: one token and many give the
// same bits.

constexpr int kTileRows = kRegisters >= 32 ? 8 : kRegisters >= 8 ? 4 : 1;
constexpr int tile_vectors(int rows) {
  if (kRegisters >= 32) return rows <= 4 ? 4 : 3;
  return kRegisters >= 8 && rows <= 2 ? 2 : 1;
}

// Vectors of the next tile: a single one has too few chains to hide the latency of fma, so four go as two and
// two.
template <int R>
FLASHMOE_INLINE int next_vectors(int64_t left) {
  constexpr int kMost = tile_vectors(R);
  if (left >= kMost && left != kMost + 1) return kMost;
  return left >= 2 && kMost >= 2 ? 2 : 1;
}

// Odd multiples of 64 bytes: rows of 2 KiB would share their sets of the first-level cache.
constexpr int64_t kQueryStride = kMaxHeadDim + 16;
constexpr int64_t kScoreStride = kKeyBlock + 16;

// Memory fetched into the second-level cache a little at each step of the arithmetic, which hides its
// latency.
struct Ahead {
  const uint8_t* at;
  int64_t step;  // bytes for each vector of keys or values

  template <class E>
  FLASHMOE_INLINE_MEMBER void advance(int vectors) {
    FLASHMOE_UNROLL(4)
    for (int i = 0; i < vectors * 16 * static_cast<int>(sizeof(E)); i += 64) __builtin_prefetch(at + i, 0, 2);
    at += step * vectors;
  }
};

FLASHMOE_INLINE Ahead spread(const Fetch& fetch, int64_t vectors) {
  return {static_cast<const uint8_t*>(fetch.at), (fetch.nbytes + vectors - 1) / vectors};
}

struct Block {
  const CacheView* cache;
  const uint8_t* data;  // of the first 16 positions
  int64_t nbytes;       // of 16 positions
  int64_t count;        // keys
};

// Scores of V x 16 keys with R queries.
template <class E, int R, int V>
FLASHMOE_INLINE void score_tile(const Block& keys, int64_t first, const float* q, float scale, Ahead& ahead,
                                float* score) {
  const int64_t dim = keys.cache->head_dim, width = sizeof(E) == 1 ? kCacheScaleGroup : dim;
  const uint8_t* block = keys.data + first / 16 * keys.nbytes;
  for (int64_t begin = 0; begin < dim; begin += width) {
    const int64_t end = begin + width < dim ? begin + width : dim;
    F32x16 sum[R * V];
    FLASHMOE_UNROLL(24)
    for (int i = 0; i < R * V; ++i) sum[i] = zero();
    for (int64_t i = begin; i < end; ++i) {
      F32x16 key[V];
      FLASHMOE_UNROLL(4)
      for (int v = 0; v < V; ++v) {
        key[v] = load_elements(reinterpret_cast<const E*>(block + v * keys.nbytes) + 16 * i);
      }
      FLASHMOE_UNROLL(8)
      for (int r = 0; r < R; ++r) {
        const F32x16 x = set1(q[r * kQueryStride + i]);
        FLASHMOE_UNROLL(4)
        for (int v = 0; v < V; ++v) sum[r * V + v] = fma(x, key[v], sum[r * V + v]);
      }
      ahead.template advance<E>(V);
    }
    FLASHMOE_UNROLL(4)
    for (int v = 0; v < V; ++v) {
      F32x16 factor = set1(scale);
      if (sizeof(E) == 1) {
        const float* scales = cache_scales(*keys.cache, block + v * keys.nbytes);
        factor = mul(factor, load(scales + begin / width * 16));
      }
      FLASHMOE_UNROLL(8)
      for (int r = 0; r < R; ++r) {
        float* to = score + r * kScoreStride + first + 16 * v;
        store(to, begin == 0 ? mul(sum[r * V + v], factor) : fma(sum[r * V + v], factor, load(to)));
      }
    }
  }
}

template <class E, int R>
FLASHMOE_INLINE void all_scores(const Block& keys, const float* q, float scale, Ahead ahead, float* score) {
  for (int64_t first = 0; first < keys.count;) {
    const int vectors = next_vectors<R>((keys.count - first + 15) / 16);
    switch (vectors) {
      case 1:
        score_tile<E, R, 1>(keys, first, q, scale, ahead, score);
        break;
      case 2:
        score_tile<E, R, 2>(keys, first, q, scale, ahead, score);
        break;
      default:
        score_tile<E, R, tile_vectors(R)>(keys, first, q, scale, ahead, score);
    }
    first += 16 * vectors;
  }
}

// Turns the scores of one head into weights exp(score - max).
FLASHMOE_INLINE void block_weights(float* score, int64_t skip, int64_t count, float* block_max,
                                   float* block_sum) {
  const int64_t end = (count + 15) / 16 * 16;
  for (int64_t j = 0; j < skip; ++j) score[j] = -1e30f;
  for (int64_t j = count; j < end; ++j) score[j] = -1e30f;
  F32x16 largest = load(score);
  for (int64_t j = 16; j < end; j += 16) largest = max(largest, load(score + j));
  const float m = reduce_max(largest);
  F32x16 total = zero();
  for (int64_t j = 0; j < end; j += 16) {
    const F32x16 w = exp(sub(load(score + j), set1(m)));
    store(score + j, w);
    total = add(total, w);
  }
  *block_max = m;
  *block_sum = reduce_add(total);
}

// V x 16 columns of the weighted sum of the values.
template <class E, int R, int V>
FLASHMOE_INLINE void value_tile(const Block& values, int64_t column, const float* weight, Ahead& ahead,
                                const AttentionPart& part) {
  const int64_t row_step = CacheView::padded(values.cache->head_dim);
  F32x16 sum[R * V];
  FLASHMOE_UNROLL(24)
  for (int i = 0; i < R * V; ++i) sum[i] = zero();
  const uint8_t* block = values.data;
  for (int64_t first = 0; first < values.count; first += 16, block += values.nbytes) {
    const E* row = reinterpret_cast<const E*>(block) + column;
    const int64_t end = first + 16 < values.count ? first + 16 : values.count;
    for (int64_t j = first; j < end; ++j, row += row_step) {
      F32x16 value[V];
      FLASHMOE_UNROLL(4)
      for (int v = 0; v < V; ++v) value[v] = load_elements(row + 16 * v);
      FLASHMOE_UNROLL(8)
      for (int r = 0; r < R; ++r) {
        const F32x16 x = set1(weight[r * kScoreStride + j]);
        FLASHMOE_UNROLL(4)
        for (int v = 0; v < V; ++v) sum[r * V + v] = fma(x, value[v], sum[r * V + v]);
      }
      ahead.template advance<E>(V);
    }
  }
  FLASHMOE_UNROLL(8)
  for (int r = 0; r < R; ++r) {
    FLASHMOE_UNROLL(4)
    for (int v = 0; v < V; ++v) store(part.acc + r * part.stride + column + 16 * v, sum[r * V + v]);
  }
}

// Weights times the scales of one group of an int8 cache.
FLASHMOE_INLINE void scale_weights(const Block& values, int64_t group, int rows, const float* weight,
                                   float* scaled) {
  for (int64_t j = 0; j < values.count; j += 16) {
    const float* scales = cache_scales(*values.cache, values.data + j / 16 * values.nbytes);
    const F32x16 factor = load(scales + 16 * group);
    for (int r = 0; r < rows; ++r) {
      store(scaled + r * kScoreStride + j, mul(load(weight + r * kScoreStride + j), factor));
    }
  }
}

template <class E, int R>
FLASHMOE_INLINE void all_values(const Block& values, const float* weight, Ahead ahead,
                                const AttentionPart& part) {
  alignas(64) float scaled[sizeof(E) == 1 ? R * kScoreStride : 16];
  const int64_t columns = CacheView::padded(values.cache->head_dim);
  const int64_t width = sizeof(E) == 1 ? kCacheScaleGroup : columns;
  for (int64_t begin = 0; begin < columns; begin += width) {
    if (sizeof(E) == 1) scale_weights(values, begin / width, R, weight, scaled);
    const float* factors = sizeof(E) == 1 ? scaled : weight;
    const int64_t end = begin + width < columns ? begin + width : columns;
    for (int64_t column = begin; column < end;) {
      const int vectors = next_vectors<R>((end - column) / 16);
      switch (vectors) {
        case 1:
          value_tile<E, R, 1>(values, column, factors, ahead, part);
          break;
        case 2:
          value_tile<E, R, 2>(values, column, factors, ahead, part);
          break;
        default:
          value_tile<E, R, tile_vectors(R)>(values, column, factors, ahead, part);
      }
      column += 16 * vectors;
    }
  }
}

template <class E, int R>
void attend_rows(const AttentionTask& task, const float* queries, const AttentionPart& part) {
  alignas(64) float q[R * kQueryStride];
  alignas(64) float score[R * kScoreStride];
  const int64_t dim = task.keys.head_dim;
  for (int r = 0; r < R; ++r)
    __builtin_memcpy(q + r * kQueryStride, queries + r * dim, 4 * static_cast<size_t>(dim));
  const Block keys{&task.keys, task.keys.block(task.kv_head, task.first), task.keys.block_nbytes(),
                   task.count};
  const Block values{&task.values, task.values.block(task.kv_head, task.first), task.values.block_nbytes(),
                     task.count};
  all_scores<E, R>(keys, q, task.scale, spread(task.with_scores, (task.count + 15) / 16 * dim), score);
  for (int r = 0; r < R; ++r) {
    block_weights(score + r * kScoreStride, task.skip, task.count, part.max + r, part.sum + r);
  }
  all_values<E, R>(values, score, spread(task.with_values, task.count * CacheView::padded(dim) / 16), part);
}

// Calls attend_rows for a number of rows that is known at run time only.
template <class E, int R>
FLASHMOE_INLINE void attend_rows_of(int64_t rows, const AttentionTask& task, const float* q,
                                    const AttentionPart& part) {
  if (rows == R) return attend_rows<E, R>(task, q, part);
  if constexpr (R > 1) attend_rows_of<E, R - 1>(rows, task, q, part);
}

template <class E>
void attend_heads(const AttentionTask& task, const AttentionPart& part) {
  // As even as possible: four and four are faster than seven and one.
  const int64_t tiles = (task.heads + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t rows = (task.heads - row + tiles - tile - 1) / (tiles - tile);
    const AttentionPart own{part.max + row, part.sum + row, part.acc + row * part.stride, part.stride};
    attend_rows_of<E, kTileRows>(rows, task, task.q + row * task.keys.head_dim, own);
    row += rows;
  }
}

void attend(const AttentionTask& task, const AttentionPart& part) {
  switch (task.keys.type) {
    case CacheType::f32:
      return attend_heads<float>(task, part);
    case CacheType::f16:
      return attend_heads<uint16_t>(task, part);
    case CacheType::int8:
      return attend_heads<int8_t>(task, part);
  }
}

void merge_parts(const AttentionPart& total, const AttentionPart& part, int64_t heads, int64_t dim) {
  for (int64_t h = 0; h < heads; ++h) {
    const float m = total.max[h] > part.max[h] ? total.max[h] : part.max[h];
    const F32x16 before = exp(set1(total.max[h] - m)), now = exp(set1(part.max[h] - m));
    float* acc = total.acc + h * total.stride;
    const float* added = part.acc + h * part.stride;
    for (int64_t i = 0; i < dim; i += 16) {
      const F32x16 kept = mul(load_n(acc + i, dim - i), before);
      store_n(acc + i, fma(load_n(added + i, dim - i), now, kept), dim - i);
    }
    const F32x16 sum = fma(set1(part.sum[h]), now, mul(set1(total.sum[h]), before));
    store_n(total.sum + h, sum, 1);
    total.max[h] = m;
  }
}

// A sink joins the sum as one more key whose value is zero.
FLASHMOE_INLINE void add_sink(const AttentionPart& total, float sink, int64_t h, int64_t dim) {
  const float m = total.max[h] > sink ? total.max[h] : sink;
  const F32x16 before = exp(set1(total.max[h] - m)), now = exp(set1(sink - m));
  float* acc = total.acc + h * total.stride;
  for (int64_t i = 0; i < dim; i += 16) store_n(acc + i, mul(load_n(acc + i, dim - i), before), dim - i);
  store_n(total.sum + h, fma(set1(total.sum[h]), before, now), 1);
}

void finish_attention(const AttentionPart& total, const float* gate, const float* sinks, int64_t heads,
                      int64_t dim) {
  for (int64_t h = 0; h < heads; ++h) {
    if (sinks != nullptr) add_sink(total, sinks[h], h, dim);
    const F32x16 sum = set1(total.sum[h]);
    float* acc = total.acc + h * total.stride;
    for (int64_t i = 0; i < dim; i += 16) {
      F32x16 divisor = sum;
      // One division for the mean and the gate's 1 / (1 + e^-gate).
      if (gate != nullptr) {
        const F32x16 shut = add(set1(1.0f), exp(sub(zero(), load_n(gate + 2 * h * dim + i, dim - i))));
        divisor = mul(sum, shut);
      }
      store_n(acc + i, div(load_n(acc + i, dim - i), divisor), dim - i);
    }
  }
}
