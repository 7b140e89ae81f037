// Attention over the key/value cache with an online softmax (Milakov and Gimelshein, arXiv 1805.02867);
// included once per instruction set.

FLASHMOE_INLINE F32x16 load_cache(const CacheView& cache, int64_t at, int64_t n) {
  if (!cache.f16) return load_n(static_cast<const float*>(cache.data) + at, n);
  const uint16_t* p = static_cast<const uint16_t*>(cache.data) + at;
  if (n >= 16) return load_f16(p);
  uint16_t padded[16] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load_f16(padded);
}

void store_cache(const CacheView& cache, int64_t kv_head, int64_t position, const float* x) {
  const int64_t at = (kv_head * cache.context + position) * cache.head_dim;
  for (int64_t i = 0; i < cache.head_dim; i += 16) {
    const int64_t n = cache.head_dim - i;
    const F32x16 v = load_n(x + i, n);
    if (!cache.f16) {
      store_n(static_cast<float*>(cache.data) + at + i, v, n);
      continue;
    }
    uint16_t half[16];
    store_f16(half, v);
    __builtin_memcpy(static_cast<uint16_t*>(cache.data) + at + i, half,
                     static_cast<size_t>(2 * (n < 16 ? n : 16)));
  }
}

// Scores of `count` keys from `first` on for every head: score[h, j]; keys are converted once for all heads.
FLASHMOE_INLINE void score_block(const AttentionTask& task, int64_t first, int64_t count, float* score) {
  const int64_t dim = task.keys.head_dim;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = (task.kv_head * task.keys.context + first + j) * dim;
    F32x16 sum[kHeadsPerTask];
    for (int64_t h = 0; h < task.heads; ++h) sum[h] = zero();
    for (int64_t i = 0; i < dim; i += 16) {
      const F32x16 key = load_cache(task.keys, at + i, dim - i);
      for (int64_t h = 0; h < task.heads; ++h) {
        sum[h] = fma(load_n(task.q + h * dim + i, dim - i), key, sum[h]);
      }
    }
    for (int64_t h = 0; h < task.heads; ++h) score[h * kKeyBlock + j] = reduce_add(sum[h]) * task.scale;
  }
}

// Turns the scores of one head into weights exp(s - m) and updates its running maximum and sum.
FLASHMOE_INLINE F32x16 block_weights(float* score, int64_t count, float* running_max, float* running_sum) {
  for (int64_t j = count; j < kKeyBlock; ++j) score[j] = -1e30f;
  F32x16 largest = load(score);
  for (int64_t j = 16; j < kKeyBlock; j += 16) largest = max(largest, load(score + j));
  const float block_max = reduce_max(largest);
  const float m = *running_max > block_max ? *running_max : block_max;
  const F32x16 correction = exp(set1(*running_max - m));
  F32x16 total = zero();
  for (int64_t j = 0; j < kKeyBlock; j += 16) {
    const F32x16 w = exp(sub(load(score + j), set1(m)));
    store(score + j, w);
    total = add(total, w);
  }
  float factor[16];
  store(factor, correction);
  *running_sum = __builtin_fmaf(*running_sum, factor[0], reduce_add(total));
  *running_max = m;
  return correction;
}

FLASHMOE_INLINE void add_values(const AttentionTask& task, int64_t first, int64_t count, const float* weight,
                                const F32x16* correction, float* acc) {
  const int64_t dim = task.values.head_dim;
  for (int64_t i = 0; i < dim; i += 16) {
    F32x16 sum[kHeadsPerTask];
    for (int64_t h = 0; h < task.heads; ++h) sum[h] = mul(load(acc + h * kMaxHeadDim + i), correction[h]);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = (task.kv_head * task.values.context + first + j) * dim;
      const F32x16 value = load_cache(task.values, at + i, dim - i);
      for (int64_t h = 0; h < task.heads; ++h) sum[h] = fma(set1(weight[h * kKeyBlock + j]), value, sum[h]);
    }
    for (int64_t h = 0; h < task.heads; ++h) store(acc + h * kMaxHeadDim + i, sum[h]);
  }
}

void attention(const AttentionTask& task) {
  alignas(64) float acc[kHeadsPerTask * kMaxHeadDim] = {};
  alignas(64) float score[kHeadsPerTask * kKeyBlock];
  float running_max[kHeadsPerTask], running_sum[kHeadsPerTask];
  for (int64_t h = 0; h < kHeadsPerTask; ++h) {
    running_max[h] = -1e30f;
    running_sum[h] = 0.0f;
  }
  for (int64_t first = 0; first < task.visible; first += kKeyBlock) {
    const int64_t count = task.visible - first < kKeyBlock ? task.visible - first : kKeyBlock;
    F32x16 correction[kHeadsPerTask];
    score_block(task, first, count, score);
    for (int64_t h = 0; h < task.heads; ++h) {
      correction[h] = block_weights(score + h * kKeyBlock, count, &running_max[h], &running_sum[h]);
    }
    add_values(task, first, count, score, correction, acc);
  }
  const int64_t dim = task.values.head_dim;
  for (int64_t h = 0; h < task.heads; ++h) {
    const F32x16 sum = set1(running_sum[h]);
    for (int64_t i = 0; i < dim; i += 16) {
      const F32x16 gate = sigmoid(load_n(task.gate + 2 * h * dim + i, dim - i));
      store_n(task.out + h * dim + i, mul(div(load(acc + h * kMaxHeadDim + i), sum), gate), dim - i);
    }
  }
}
