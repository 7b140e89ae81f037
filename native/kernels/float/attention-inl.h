// Attention over the key/value cache with an online softmax (Milakov and Gimelshein, arXiv 1805.02867);
// included once per instruction set.
//
// A task is some neighbouring tokens and the query heads that share one key head.  Keys are taken in blocks
// of kKeyBlock at absolute positions; within a block four query rows meet four keys (or four vectors of
// values) at a time: sixteen sums in registers, eight loads for sixteen fused multiply-adds.

constexpr int kRowsTogether = 4;
constexpr int kKeysTogether = 4;

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

// What the inner loops must know of a cache as constants: whole vectors need no mask.
struct CacheKind {
  bool f16;
  bool whole;
};

FLASHMOE_INLINE F32x16 load_kind(const CacheView& cache, CacheKind kind, int64_t at, int64_t n) {
  if (!kind.whole) return load_cache(cache, at, n);
  if (kind.f16) return load_f16(static_cast<const uint16_t*>(cache.data) + at);
  return load(static_cast<const float*>(cache.data) + at);
}

// One key block of a task.
struct KeyRange {
  int64_t at;     // element of its first key in the cache
  int64_t count;  // keys that are visible
};

// score[r, j] = q_r . k_j * scale for n query rows, head_dim apart.  Rows beyond the count repeat the last
// key.
FLASHMOE_INLINE void score_rows(const AttentionTask& task, CacheKind kind, const KeyRange& range,
                                const float* q, int n, float* score) {
  const int64_t dim = task.keys.head_dim;
  F32x16 parts[kRowsTogether * 16];
  for (int i = 0; i < kRowsTogether * 16; ++i) parts[i] = zero();
  for (int64_t j = 0; j < range.count; j += kKeysTogether) {
    F32x16 sum[kRowsTogether * kKeysTogether];
    int64_t key[kKeysTogether];
    FLASHMOE_UNROLL(4)
    for (int c = 0; c < kKeysTogether; ++c) {
      key[c] = range.at + (j + c < range.count ? j + c : range.count - 1) * dim;
    }
    FLASHMOE_UNROLL(16)
    for (int i = 0; i < n * kKeysTogether; ++i) sum[i] = zero();
    for (int64_t i = 0; i < dim; i += 16) {
      F32x16 k[kKeysTogether];
      FLASHMOE_UNROLL(4)
      for (int c = 0; c < kKeysTogether; ++c) k[c] = load_kind(task.keys, kind, key[c] + i, dim - i);
      FLASHMOE_UNROLL(4)
      for (int r = 0; r < n; ++r) {
        const float* x = q + r * dim + i;
        const F32x16 row = kind.whole ? load(x) : load_n(x, dim - i);
        FLASHMOE_UNROLL(4)
        for (int c = 0; c < kKeysTogether; ++c) {
          sum[r * kKeysTogether + c] = fma(row, k[c], sum[r * kKeysTogether + c]);
        }
      }
    }
    const int64_t lane = j % 16;
    FLASHMOE_UNROLL(4)
    for (int r = 0; r < n; ++r) {
      FLASHMOE_UNROLL(4)
      for (int c = 0; c < kKeysTogether; ++c) parts[r * 16 + lane + c] = sum[r * kKeysTogether + c];
    }
    if (lane + kKeysTogether < 16 && j + kKeysTogether < range.count) continue;
    for (int r = 0; r < n; ++r) {
      store(score + r * kKeyBlock + j - lane, mul(reduce_add_each(parts + r * 16), set1(task.scale)));
    }
  }
}

// Turns the scores of one row into weights exp(s - m) and updates its running maximum and sum.
FLASHMOE_INLINE float block_weights(float* score, int64_t count, float* running_max, float* running_sum) {
  for (int64_t j = count; j < kKeyBlock; ++j) score[j] = -1e30f;
  F32x16 largest = load(score);
  for (int64_t j = 16; j < kKeyBlock; j += 16) largest = max(largest, load(score + j));
  const float block_max = reduce_max(largest);
  const float m = *running_max > block_max ? *running_max : block_max;
  float correction[16];
  store(correction, exp(set1(*running_max - m)));
  F32x16 total = zero();
  for (int64_t j = 0; j < kKeyBlock; j += 16) {
    const F32x16 w = exp(sub(load(score + j), set1(m)));
    store(score + j, w);
    total = add(total, w);
  }
  *running_sum = __builtin_fmaf(*running_sum, correction[0], reduce_add(total));
  *running_max = m;
  return correction[0];
}

// acc[r] = acc[r] * correction[r] + sum_j weight[r, j] v_j, for n rows and `width` vectors from column i on.
FLASHMOE_INLINE void add_columns(const AttentionTask& task, CacheKind kind, const KeyRange& range, int64_t i,
                                 int width, const float* weight, const float* correction, int n, float* acc) {
  const int64_t dim = task.values.head_dim;
  F32x16 sum[kRowsTogether * 4] = {};
  FLASHMOE_UNROLL(4)
  for (int r = 0; r < n; ++r) {
    FLASHMOE_UNROLL(4)
    for (int c = 0; c < width; ++c) {
      sum[r * width + c] = mul(load(acc + r * kMaxHeadDim + i + 16 * c), set1(correction[r]));
    }
  }
  for (int64_t j = 0; j < range.count; ++j) {
    F32x16 v[4];
    FLASHMOE_UNROLL(4)
    for (int c = 0; c < width; ++c) {
      v[c] = load_kind(task.values, kind, range.at + j * dim + i + 16 * c, dim - i - 16 * c);
    }
    FLASHMOE_UNROLL(4)
    for (int r = 0; r < n; ++r) {
      const F32x16 w = set1(weight[r * kKeyBlock + j]);
      FLASHMOE_UNROLL(4)
      for (int c = 0; c < width; ++c) sum[r * width + c] = fma(w, v[c], sum[r * width + c]);
    }
  }
  FLASHMOE_UNROLL(4)
  for (int r = 0; r < n; ++r) {
    FLASHMOE_UNROLL(4)
    for (int c = 0; c < width; ++c) store(acc + r * kMaxHeadDim + i + 16 * c, sum[r * width + c]);
  }
}

// One key block for n rows of one token.
FLASHMOE_INLINE void attend_rows(const AttentionTask& task, CacheKind kind, const KeyRange& range,
                                 const float* q, AttentionRow* state, float* acc, int n) {
  alignas(64) float score[kRowsTogether * kKeyBlock];
  float correction[kRowsTogether];
  score_rows(task, kind, range, q, n, score);
  for (int r = 0; r < n; ++r) {
    correction[r] = block_weights(score + r * kKeyBlock, range.count, &state[r].max, &state[r].sum);
  }
  const int64_t dim = task.values.head_dim;
  int64_t i = 0;
  for (; i + 64 <= dim; i += 64) add_columns(task, kind, range, i, 4, score, correction, n, acc);
  for (; i < dim; i += 16) add_columns(task, kind, range, i, 1, score, correction, n, acc);
}

__attribute__((noinline)) void attend_block(const AttentionTask& task, const KeyRange& range, const float* q,
                                            int n, AttentionRow* state, float* acc) {
  const bool whole = task.keys.head_dim % 16 == 0;
#if !defined(FLASHMOE_SANITIZED)
#define FLASHMOE_ATTEND(rows)                                                                       \
  if (kSpecialised && whole && n == rows) {                                                         \
    if (task.keys.f16) return attend_rows(task, CacheKind{true, true}, range, q, state, acc, rows); \
    return attend_rows(task, CacheKind{false, true}, range, q, state, acc, rows);                   \
  }
  FLASHMOE_ATTEND(1)
  FLASHMOE_ATTEND(2)
  FLASHMOE_ATTEND(3)
  FLASHMOE_ATTEND(4)
#undef FLASHMOE_ATTEND
#endif
  attend_rows(task, CacheKind{task.keys.f16, whole}, range, q, state, acc, n);
}

FLASHMOE_INLINE void write_attention(const AttentionTask& task, int64_t t, const AttentionRow* state,
                                     const float* acc) {
  const int64_t dim = task.values.head_dim;
  for (int64_t h = 0; h < task.heads; ++h) {
    const F32x16 sum = set1(state[h].sum);
    const float* gate = task.gate + t * task.gate_stride + 2 * h * dim;
    float* out = task.out + t * task.out_stride + h * dim;
    for (int64_t i = 0; i < dim; i += 16) {
      const F32x16 open = sigmoid(load_n(gate + i, dim - i));
      store_n(out + i, mul(div(load(acc + h * kMaxHeadDim + i), sum), open), dim - i);
    }
  }
}

void attention(const AttentionTask& task) {
  alignas(64) float acc[kQueryBlock * kHeadsPerTask * kMaxHeadDim];
  AttentionRow state[kQueryBlock * kHeadsPerTask];
  const int64_t dim = task.keys.head_dim, padded = (dim + 15) / 16 * 16;
  for (int64_t row = 0; row < task.tokens * kHeadsPerTask; ++row) {
    state[row] = {-1e30f, 0.0f};
    for (int64_t i = 0; i < padded; i += 16) store(acc + row * kMaxHeadDim + i, zero());
  }
  const int64_t end = task.visible + task.tokens - 1;
  for (int64_t first = 0; first < end; first += kKeyBlock) {
    for (int64_t t = 0; t < task.tokens; ++t) {
      const int64_t left = task.visible + t - first;
      if (left <= 0) continue;
      const KeyRange range{(task.kv_head * task.keys.context + first) * dim,
                           left < kKeyBlock ? left : kKeyBlock};
      for (int64_t h = 0; h < task.heads; h += kRowsTogether) {
        const int64_t row = t * kHeadsPerTask + h, rest = task.heads - h;
        attend_block(task, range, task.q + t * task.q_stride + h * dim,
                     static_cast<int>(rest < kRowsTogether ? rest : kRowsTogether), state + row,
                     acc + row * kMaxHeadDim);
      }
    }
  }
  for (int64_t t = 0; t < task.tokens; ++t) {
    write_attention(task, t, state + t * kHeadsPerTask, acc + t * kHeadsPerTask * kMaxHeadDim);
  }
}
