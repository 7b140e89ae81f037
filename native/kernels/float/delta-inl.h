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
struct KeySums {
  F32x16 with_k[4], with_q[4];
};

FLASHMOE_INLINE F32x16 pairwise(const F32x16* sum) { return add(add(sum[0], sum[1]), add(sum[2], sum[3])); }

FLASHMOE_INLINE void clear(KeySums& sums) {
  for (int c = 0; c < 4; ++c) sums.with_k[c] = sums.with_q[c] = zero();
}

FLASHMOE_INLINE void read_row(KeySums& sums, int chain, F32x16 s, float k, float q) {
  sums.with_k[chain] = fma(s, set1(k), sums.with_k[chain]);
  sums.with_q[chain] = fma(s, set1(q), sums.with_q[chain]);
}

// Sixteen value columns of one head through all tokens; `block` [key_dim, 16] stays in the first-level cache.
FLASHMOE_INLINE void delta_columns(const DeltaStep& p, int64_t column, float* block) {
  const int64_t n = p.value_dim - column;
  KeySums sums;
  clear(sums);
  for (int64_t i = 0; i < p.key_dim; ++i) {
    const F32x16 s = load_n(p.state + i * p.value_dim + column, n);
    store(block + 16 * i, s);
    read_row(sums, static_cast<int>(i & 3), s, p.k[i], p.q[i]);
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    const F32x16 decay = set1(p.decay[t * p.gate_stride]);
    const F32x16 read = mul(decay, pairwise(sums.with_k));
    const F32x16 v = load_n(p.v + t * p.v_stride + column, n);
    const F32x16 change = mul(set1(p.beta[t * p.gate_stride]), sub(v, read));
    const F32x16 kq = set1(p.kq[t * p.kq_stride]);
    store_n(p.out + t * p.out_stride + column, fma(kq, change, mul(decay, pairwise(sums.with_q))), n);
    const float* k = p.k + t * p.qk_stride;
    const bool more = t + 1 < p.tokens;
    const float* next_k = more ? k + p.qk_stride : k;
    const float* next_q = more ? p.q + (t + 1) * p.qk_stride : k;
    clear(sums);
    for (int64_t i = 0; i < p.key_dim; i += 4) {
      for (int c = 0; c < 4; ++c) {
        const F32x16 s = fma(set1(k[i + c]), change, mul(decay, load(block + 16 * (i + c))));
        store(block + 16 * (i + c), s);
        read_row(sums, c, s, next_k[i + c], next_q[i + c]);
      }
    }
  }
  for (int64_t i = 0; i < p.key_dim; ++i) {
    store_n(p.state + i * p.value_dim + column, load(block + 16 * i), n);
  }
}

void delta_head(const DeltaStep& step) {
  alignas(64) float block[16 * kMaxHeadDim];
  for (int64_t column = 0; column < step.value_dim; column += 16) delta_columns(step, column, block);
}
