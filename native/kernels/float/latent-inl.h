// Attention over latents (multi-head latent attention, arXiv 2405.04434, in its absorbed form): all heads
// read the same keys, whose first `rank` numbers are the values too; included once per instruction set.
//
// Heads are lanes: a number of a key is broadcast to all of them, so nothing is ever summed over lanes, and a
// head's result does not depend on which others share the pass.  Each element is one chain: a score over the
// numbers of its key, a result over the keys, whose running maximum moves every kKeyBlock of them.

constexpr int kLatentVectors = kLatentHeads / 16;
// Keys, and columns of the values, whose sums stay in registers together.
constexpr int kLatentTile = kRegisters >= 32 ? 8 : kRegisters >= 8 ? 2 : 1;

// Queries with heads side by side, [head_dim, kLatentHeads]; lanes without a head are zero.
FLASHMOE_INLINE void spread_queries(const LatentTask& task, float* q) {
  const int64_t width = task.latents.head_dim;
  for (int64_t i = 0; i < width * kLatentHeads; i += 16) store(q + i, zero());
  for (int64_t h = 0; h < task.heads; ++h) {
    for (int64_t i = 0; i < width; ++i) q[i * kLatentHeads + h] = task.q[h * width + i];
  }
}

// The `count` (at most 16) keys of one block of the cache as floats, [count, head_dim].
template <class E>
FLASHMOE_INLINE void load_latents(const CacheView& cache, const uint8_t* block, int64_t count, float* rows) {
  const int64_t width = cache.head_dim, step = CacheView::padded(width);
  for (int64_t j = 0; j < count; ++j) {
    const E* row = reinterpret_cast<const E*>(block) + j * step;
    for (int64_t i = 0; i < width; i += 16) {
      F32x16 x = load_elements(row + i);
      if (sizeof(E) == 1) x = mul(x, set1(cache_scales(cache, block)[i / kCacheScaleGroup * 16 + j]));
      store_n(rows + j * width + i, x, width - i);
    }
  }
}

// score[j] for J keys, scaled.
template <int J>
FLASHMOE_INLINE void latent_scores(const float* rows, int64_t width, const float* q, float scale,
                                   float* score) {
  F32x16 sum[J * kLatentVectors];
  FLASHMOE_UNROLL(16)
  for (int i = 0; i < J * kLatentVectors; ++i) sum[i] = zero();
  for (int64_t i = 0; i < width; ++i) {
    F32x16 query[kLatentVectors];
    FLASHMOE_UNROLL(2)
    for (int v = 0; v < kLatentVectors; ++v) query[v] = load(q + i * kLatentHeads + 16 * v);
    FLASHMOE_UNROLL(8)
    for (int j = 0; j < J; ++j) {
      const F32x16 x = set1(rows[j * width + i]);
      FLASHMOE_UNROLL(2)
      for (int v = 0; v < kLatentVectors; ++v) {
        sum[j * kLatentVectors + v] = fma(x, query[v], sum[j * kLatentVectors + v]);
      }
    }
  }
  FLASHMOE_UNROLL(16)
  for (int i = 0; i < J * kLatentVectors; ++i) store(score + 16 * i, mul(sum[i], set1(scale)));
}

// acc[i] += the keys' weights times their i-th number, for J columns.
template <int J>
FLASHMOE_INLINE void latent_values(const float* rows, int64_t width, int64_t count, const float* weight,
                                   float* acc) {
  F32x16 sum[J * kLatentVectors];
  FLASHMOE_UNROLL(16)
  for (int i = 0; i < J * kLatentVectors; ++i) sum[i] = load(acc + 16 * i);
  for (int64_t key = 0; key < count; ++key) {
    F32x16 w[kLatentVectors];
    FLASHMOE_UNROLL(2)
    for (int v = 0; v < kLatentVectors; ++v) w[v] = load(weight + key * kLatentHeads + 16 * v);
    FLASHMOE_UNROLL(8)
    for (int j = 0; j < J; ++j) {
      const F32x16 x = set1(rows[key * width + j]);
      FLASHMOE_UNROLL(2)
      for (int v = 0; v < kLatentVectors; ++v) {
        sum[j * kLatentVectors + v] = fma(x, w[v], sum[j * kLatentVectors + v]);
      }
    }
  }
  FLASHMOE_UNROLL(16)
  for (int i = 0; i < J * kLatentVectors; ++i) store(acc + 16 * i, sum[i]);
}

// Scores to weights exp(score - max) with the maximum of all keys so far; what was summed before is scaled to
// it.
FLASHMOE_INLINE void latent_weights(float* score, int64_t count, int64_t rank, const LatentPart& part) {
  for (int64_t at = 0; at < kLatentHeads; at += 16) {
    const F32x16 before = load(part.max + at);
    F32x16 largest = before;
    for (int64_t j = 0; j < count; ++j) largest = max(largest, load(score + j * kLatentHeads + at));
    const F32x16 kept = exp(sub(before, largest));
    F32x16 sum = mul(load(part.sum + at), kept);
    for (int64_t j = 0; j < count; ++j) {
      const F32x16 w = exp(sub(load(score + j * kLatentHeads + at), largest));
      store(score + j * kLatentHeads + at, w);
      sum = add(sum, w);
    }
    store(part.max + at, largest);
    store(part.sum + at, sum);
    for (int64_t i = 0; i < rank; ++i) {
      float* acc = part.acc + i * kLatentHeads + at;
      store(acc, mul(load(acc), kept));
    }
  }
}

// At most kKeyBlock keys from position `first` on.
template <class E>
FLASHMOE_INLINE void attend_latent_block(const LatentTask& task, const float* q, int64_t first, int64_t count,
                                         float* rows, float* score, const LatentPart& part) {
  const int64_t width = task.latents.head_dim;
  for (int64_t at = 0; at < count; at += kCachePositions) {
    const int64_t keys = count - at < kCachePositions ? count - at : kCachePositions;
    load_latents<E>(task.latents, task.latents.block(0, first + at), keys, rows);
    int64_t j = 0;
    for (; j + kLatentTile <= keys; j += kLatentTile) {
      latent_scores<kLatentTile>(rows + j * width, width, q, task.scale, score + (at + j) * kLatentHeads);
    }
    for (; j < keys; ++j) {
      latent_scores<1>(rows + j * width, width, q, task.scale, score + (at + j) * kLatentHeads);
    }
  }
  latent_weights(score, count, task.rank, part);
  for (int64_t at = 0; at < count; at += kCachePositions) {
    const int64_t keys = count - at < kCachePositions ? count - at : kCachePositions;
    load_latents<E>(task.latents, task.latents.block(0, first + at), keys, rows);
    const float* weight = score + at * kLatentHeads;
    int64_t i = 0;
    for (; i + kLatentTile <= task.rank; i += kLatentTile) {
      latent_values<kLatentTile>(rows + i, width, keys, weight, part.acc + i * kLatentHeads);
    }
    for (; i < task.rank; ++i) latent_values<1>(rows + i, width, keys, weight, part.acc + i * kLatentHeads);
  }
}

template <class E>
void attend_latents_of(const LatentTask& task, const LatentPart& part) {
  alignas(64) float q[kMaxLatent * kLatentHeads];
  alignas(64) float rows[kCachePositions * kMaxLatent];
  alignas(64) float score[kKeyBlock * kLatentHeads];
  spread_queries(task, q);
  for (int64_t i = 0; i < kLatentHeads; i += 16) {
    store(part.max + i, set1(-1e30f));
    store(part.sum + i, zero());
  }
  for (int64_t i = 0; i < task.rank * kLatentHeads; i += 16) store(part.acc + i, zero());
  for (int64_t at = 0; at < task.count; at += kKeyBlock) {
    const int64_t keys = task.count - at < kKeyBlock ? task.count - at : kKeyBlock;
    attend_latent_block<E>(task, q, task.first + at, keys, rows, score, part);
  }
}

void attend_latents(const LatentTask& task, const LatentPart& part) {
  switch (task.latents.type) {
    case CacheType::f32:
      return attend_latents_of<float>(task, part);
    case CacheType::f16:
      return attend_latents_of<uint16_t>(task, part);
    case CacheType::int8:
      return attend_latents_of<int8_t>(task, part);
  }
}

void merge_latents(const LatentPart& total, const LatentPart& part, int64_t rank) {
  for (int64_t at = 0; at < kLatentHeads; at += 16) {
    const F32x16 mine = load(total.max + at), other = load(part.max + at), m = max(mine, other);
    const F32x16 before = exp(sub(mine, m)), now = exp(sub(other, m));
    store(total.sum + at, fma(load(part.sum + at), now, mul(load(total.sum + at), before)));
    store(total.max + at, m);
    for (int64_t i = 0; i < rank; ++i) {
      float* acc = total.acc + i * kLatentHeads + at;
      store(acc, fma(load(part.acc + i * kLatentHeads + at), now, mul(load(acc), before)));
    }
  }
}

void finish_latents(const LatentPart& total, int64_t heads, int64_t rank, float* out) {
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t h = 0; h < heads; ++h) out[h * rank + i] = total.acc[i * kLatentHeads + h] / total.sum[h];
  }
}
