// Passes over a vocabulary; included once per instruction set inside its namespace.

namespace {

FLASHMOE_INLINE F32x16 load_or(const float* x, int64_t n, float other) {
  if (n >= 16) return load(x);
  float padded[16];
  for (int64_t i = 0; i < 16; ++i) padded[i] = i < n ? x[i] : other;
  return load(padded);
}

bool block_maxima(const float* x, int64_t n, float* maxima) {
  F32x16 differences = zero();  // x - x: NaN where x is NaN or infinite
  for (int64_t first = 0; first < n; first += kSampleBlock) {
    F32x16 largest = set1(-__builtin_inff());
    for (int64_t i = first; i < n && i < first + kSampleBlock; i += 16) {
      const F32x16 v = load_or(x + i, n - i, x[first]);
      largest = max(largest, v);
      differences = add(differences, sub(v, v));
    }
    maxima[first / kSampleBlock] = reduce_max(largest);
  }
  return reduce_add(differences) == 0.0f;
}

void hide(const float* x, const uint32_t* allowed, int64_t n, float* out) {
  const F32x16 never = set1(-__builtin_inff());
  for (int64_t i = 0; i < n; i += 16) {
    const uint32_t bits = allowed[i / 32] >> (i % 32);
    store_n(out + i, select_lanes(bits, load_n(x + i, n - i), never), n - i);
  }
}

void weights(const float* x, int64_t n, float largest, float inverse, float* w) {
  const F32x16 m = set1(largest), factor = set1(inverse);
  for (int64_t i = 0; i < n; i += 16) {
    store_n(w + i, exp(mul(sub(load_n(x + i, n - i), m), factor)), n - i);
  }
}

FLASHMOE_INLINE float block_sum(const float* w, int64_t n, float least) {
  F32x16 sum = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F32x16 v = load_n(w + i, n - i);
    sum = add(sum, zero_where_below(v, v, least));
  }
  return reduce_add(sum);
}

void block_sums(const float* w, int64_t n, float* sums) {
  for (int64_t first = 0; first < n; first += kSampleBlock) {
    const int64_t left = n - first;
    sums[first / kSampleBlock] = block_sum(w + first, left < kSampleBlock ? left : kSampleBlock, 0.0f);
  }
}

void drop_below(float* w, int64_t begin, int64_t end, float least) {
  for (int64_t i = begin; i < end; i += 16) {
    const F32x16 v = load_n(w + i, end - i);
    store_n(w + i, zero_where_below(v, v, least), end - i);
  }
}

double mass_from(const float* w, int64_t begin, int64_t end, float least) {
  double mass = 0.0;
  for (int64_t first = begin; first < end; first += kSampleBlock) {
    const int64_t left = end - first;
    mass += static_cast<double>(block_sum(w + first, left < kSampleBlock ? left : kSampleBlock, least));
  }
  return mass;
}

constexpr SamplerKernels kTable = {block_maxima, hide, weights, block_sums, drop_below, mass_from};

}  // namespace
