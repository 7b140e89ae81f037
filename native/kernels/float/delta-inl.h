// The gated delta rule; included once per instruction set.
//
// Per token and value of the state: two multiply-adds that read it (with this token's key and query), one
// product that lets it fade and one multiply-add that writes.  The reads of the next token are fused with the
// write, so that many tokens pass over their columns once each.  A sum over keys is one chain: any number of
// columns may be worked on together without a change of bits.

constexpr int kBlockVectors =
    kRegisters >= 32 ? 2 : 1;                          // x 16 columns x 128 keys: half of a first-level cache
constexpr int kRowVectors = kRegisters >= 32 ? 8 : 2;  // one token: rows of the state as they lie in memory

template <int V>
struct KeySums {
  F32x16 with_k[V], with_q[V];
};

template <int V>
FLASHMOE_INLINE void clear(KeySums<V>& sums) {
  FLASHMOE_UNROLL(8)
  for (int v = 0; v < V; ++v) sums.with_k[v] = sums.with_q[v] = zero();
}

template <int V>
FLASHMOE_INLINE void ask_for_row(const float* at) {
  FLASHMOE_UNROLL(8)
  for (int v = 0; v < V; ++v) __builtin_prefetch(at + 16 * v, 0, 2);
}

// state: [key_dim, stride], of which V x 16 columns are worked on; n: those that count of the last 16.
// next: as many columns of the next state, or null.
template <int V>
FLASHMOE_INLINE void delta_tokens(const DeltaStep& p, int64_t column, int64_t n, float* state, int64_t stride,
                                  const float* next) {
  KeySums<V> sums;
  clear(sums);
  for (int64_t i = 0; i < p.key_dim; ++i) {
    const F32x16 k = set1(p.k[i]), q = set1(p.q[i]);
    FLASHMOE_UNROLL(8)
    for (int v = 0; v < V; ++v) {
      const F32x16 s = load(state + i * stride + 16 * v);
      sums.with_k[v] = fma(s, k, sums.with_k[v]);
      sums.with_q[v] = fma(s, q, sums.with_q[v]);
    }
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    const F32x16 decay = set1(p.decay[t * p.gate_stride]), beta = set1(p.beta[t * p.gate_stride]);
    const F32x16 kq = set1(p.kq[t * p.kq_stride]);
    F32x16 change[V];
    FLASHMOE_UNROLL(8)
    for (int v = 0; v < V; ++v) {
      const int64_t lanes = v + 1 < V ? 16 : n;
      const F32x16 value = load_n(p.v + t * p.v_stride + column + 16 * v, lanes);
      change[v] = mul(beta, sub(value, mul(decay, sums.with_k[v])));
      const F32x16 out = fma(kq, change[v], mul(decay, sums.with_q[v]));
      store_n(p.out + t * p.out_stride + column + 16 * v, out, lanes);
    }
    const float* k = p.k + t * p.qk_stride;
    if (t + 1 < p.tokens) {
      const float* next_k = k + p.qk_stride;
      const float* next_q = p.q + (t + 1) * p.qk_stride;
      clear(sums);
      for (int64_t i = 0; i < p.key_dim; ++i) {
        const F32x16 key = set1(k[i]), after = set1(next_k[i]), asked = set1(next_q[i]);
        FLASHMOE_UNROLL(8)
        for (int v = 0; v < V; ++v) {
          float* at = state + i * stride + 16 * v;
          const F32x16 s = fma(key, change[v], mul(decay, load(at)));
          store(at, s);
          sums.with_k[v] = fma(s, after, sums.with_k[v]);
          sums.with_q[v] = fma(s, asked, sums.with_q[v]);
        }
      }
    } else {
      for (int64_t i = 0; i < p.key_dim; ++i) {
        const F32x16 key = set1(k[i]);
        // This state comes from the second-level cache by now, and memory has nothing to do.
        if (next != nullptr) ask_for_row<V>(next + i * stride);
        FLASHMOE_UNROLL(8)
        for (int v = 0; v < V; ++v) {
          float* at = state + i * stride + 16 * v;
          store(at, fma(key, change[v], mul(decay, load(at))));
        }
      }
    }
  }
}

// Through a copy of the columns that stays in the first-level cache.
template <int V>
FLASHMOE_INLINE void delta_block(const DeltaStep& p, int64_t column, int64_t n, float* block) {
  const auto lanes = [n](int v) { return v + 1 < V ? 16 : n; };
  for (int64_t i = 0; i < p.key_dim; ++i) {
    const float* row = p.state + i * p.value_dim + column;
    for (int v = 0; v < V; ++v) store(block + (i * V + v) * 16, load_n(row + 16 * v, lanes(v)));
  }
  delta_tokens<V>(p, column, n, block, 16 * V, nullptr);
  for (int64_t i = 0; i < p.key_dim; ++i) {
    float* row = p.state + i * p.value_dim + column;
    for (int v = 0; v < V; ++v) store_n(row + 16 * v, load(block + (i * V + v) * 16), lanes(v));
  }
}

void delta_head(const DeltaStep& p) {
  alignas(64) float block[16 * kBlockVectors * kMaxHeadDim];
  int64_t column = 0;
  if (p.tokens == 1) {
    for (; column + 16 * kRowVectors <= p.value_dim; column += 16 * kRowVectors) {
      const float* next = p.after != nullptr ? p.after + column : nullptr;
      delta_tokens<kRowVectors>(p, column, 16, p.state + column, p.value_dim, next);
    }
  }
  for (; column + 16 * kBlockVectors <= p.value_dim; column += 16 * kBlockVectors) {
    delta_block<kBlockVectors>(p, column, 16, block);
  }
  for (; column < p.value_dim; column += 16) {
    const int64_t left = p.value_dim - column;
    delta_block<1>(p, column, left < 16 ? left : 16, block);
  }
}
