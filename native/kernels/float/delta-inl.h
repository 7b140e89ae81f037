// Causal convolution and the gated delta rule; included once per instruction set.

void causal_conv(const float* u, const float* w, float* state, int64_t tokens, int64_t channels, int64_t taps,
                 int64_t begin, int64_t end, float* out) {
  const int64_t past = taps - 1;
  // Token by token: channels are neighbours, while tokens lie 32 KiB apart, in the same sets of the caches.
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = begin; c < end; c += 16) {
      const int64_t n = end - c;
      F32x16 acc = zero();
      for (int64_t j = 0; j < taps; ++j) {
        const int64_t row = t + j - past;
        const float* x = row < 0 ? state + (row + past) * channels : u + row * channels;
        acc = fma(load_n(w + j * channels + c, n), load_n(x + c, n), acc);
      }
      store_n(out + t * channels + c, silu(acc), n);
    }
  }
  for (int64_t c = begin; c < end; c += 16) {
    const int64_t n = end - c;
    // Row i of the new state is row tokens + i of (state, u): it lies ahead, so ascending order is safe in
    // place.
    for (int64_t i = 0; i < past; ++i) {
      const int64_t row = tokens + i - past;
      const float* x = row < 0 ? state + (row + past) * channels : u + row * channels;
      store_n(state + i * channels + c, load_n(x + c, n), n);
    }
  }
}

// Sums over keys run in four chains (k modulo 4), added pairwise: the same in the first read of the state and
// in the reads that are fused with the previous token's update.
constexpr int kChains = 4;
constexpr int kColumnVectors = 2;  // 32 value columns share the broadcasts of a key row

struct KeySums {
  F32x16 with_k[kChains * kColumnVectors], with_q[kChains * kColumnVectors];
};

FLASHMOE_INLINE F32x16 pairwise(const F32x16* sum) { return add(add(sum[0], sum[1]), add(sum[2], sum[3])); }

FLASHMOE_INLINE void clear(KeySums& sums, int width) {
  FLASHMOE_UNROLL(8)
  for (int c = 0; c < kChains * width; ++c) sums.with_k[c] = sums.with_q[c] = zero();
}

// Four rows of the state's block, `update` applied on the way: s = decay * s + k * change.
struct Update {
  F32x16 decay;
  F32x16 change[kColumnVectors];
  const float* k;
};

FLASHMOE_INLINE void update_rows(float* block, const Update& update, int width, const float* next_k,
                                 const float* next_q, KeySums& sums) {
  FLASHMOE_UNROLL(4)
  for (int c = 0; c < kChains; ++c) {
    const F32x16 k = set1(update.k[c]), read_k = set1(next_k[c]), read_q = set1(next_q[c]);
    FLASHMOE_UNROLL(2)
    for (int w = 0; w < width; ++w) {
      float* at = block + 16 * (c * width + w);
      const F32x16 s = fma(k, update.change[w], mul(update.decay, load(at)));
      store(at, s);
      sums.with_k[w * kChains + c] = fma(s, read_k, sums.with_k[w * kChains + c]);
      sums.with_q[w * kChains + c] = fma(s, read_q, sums.with_q[w * kChains + c]);
    }
  }
}

// The state's columns come into the block, [key_dim, 16 * width], and meet the first token.
FLASHMOE_INLINE void load_columns(const DeltaStep& p, int64_t column, int width, float* block,
                                  KeySums& sums) {
  clear(sums, width);
  for (int64_t i = 0; i < p.key_dim; i += kChains) {
    FLASHMOE_UNROLL(4)
    for (int c = 0; c < kChains; ++c) {
      const float* row = p.state + (i + c) * p.value_dim + column;
      // A row is 512 bytes further on: too far for what prefetches by itself.
      __builtin_prefetch(row + 8 * p.value_dim);
      const F32x16 k = set1(p.k[i + c]), q = set1(p.q[i + c]);
      FLASHMOE_UNROLL(2)
      for (int w = 0; w < width; ++w) {
        const F32x16 s = load_n(row + 16 * w, p.value_dim - column - 16 * w);
        store(block + 16 * ((i + c) * width + w), s);
        sums.with_k[w * kChains + c] = fma(s, k, sums.with_k[w * kChains + c]);
        sums.with_q[w * kChains + c] = fma(s, q, sums.with_q[w * kChains + c]);
      }
    }
  }
}

// 16 * width value columns of one head through all tokens; the block stays in the first-level cache.
FLASHMOE_INLINE void delta_columns(const DeltaStep& p, int64_t column, int width, float* block) {
  KeySums sums;
  load_columns(p, column, width, block, sums);
  for (int64_t t = 0; t < p.tokens; ++t) {
    Update update;
    update.decay = set1(p.decay[t * p.gate_stride]);
    update.k = p.k + t * p.qk_stride;
    const F32x16 beta = set1(p.beta[t * p.gate_stride]), kq = set1(p.kq[t * p.kq_stride]);
    FLASHMOE_UNROLL(2)
    for (int w = 0; w < width; ++w) {
      const int64_t at = column + 16 * w, n = p.value_dim - at;
      const F32x16 read = mul(update.decay, pairwise(sums.with_k + w * kChains));
      update.change[w] = mul(beta, sub(load_n(p.v + t * p.v_stride + at, n), read));
      const F32x16 old = mul(update.decay, pairwise(sums.with_q + w * kChains));
      store_n(p.out + t * p.out_stride + at, fma(kq, update.change[w], old), n);
    }
    const bool more = t + 1 < p.tokens;
    const float* next_k = more ? update.k + p.qk_stride : update.k;
    const float* next_q = more ? p.q + (t + 1) * p.qk_stride : update.k;
    clear(sums, width);
    for (int64_t i = 0; i < p.key_dim; i += kChains) {
      update_rows(block + 16 * i * width, update, width, next_k + i, next_q + i, sums);
      update.k += kChains;
    }
  }
  for (int64_t i = 0; i < p.key_dim; ++i) {
    for (int w = 0; w < width; ++w) {
      const int64_t at = column + 16 * w;
      store_n(p.state + i * p.value_dim + at, load(block + 16 * (i * width + w)), p.value_dim - at);
    }
  }
}

void delta_head(const DeltaStep& step) {
  alignas(64) float block[16 * kColumnVectors * kMaxHeadDim];
  int64_t column = 0;
  if (kSpecialised) {
    for (; column + 16 * kColumnVectors <= step.value_dim; column += 16 * kColumnVectors) {
      delta_columns(step, column, kColumnVectors, block);
    }
  }
  for (; column < step.value_dim; column += 16) delta_columns(step, column, 1, block);
}
