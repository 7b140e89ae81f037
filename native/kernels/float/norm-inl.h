// Norms, rotation and softmax; included once per instruction set.

// Four chains hide the latency of fma; their order is part of the definition.
FLASHMOE_INLINE float dot_all(const float* a, const float* b, int64_t n) {
  F32x16 sum[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int c = 0; c < 4; ++c) sum[c] = fma(load(a + i + 16 * c), load(b + i + 16 * c), sum[c]);
  }
  for (int c = 0; i < n; i += 16, ++c) {
    sum[c] = fma(load_n(a + i, n - i), load_n(b + i, n - i), sum[c]);
  }
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

void rms_norm(const float* x, const float* w, int64_t n, float eps, float* out) {
  const F32x16 factor = set1(1.0f / __builtin_sqrtf(dot_all(x, x, n) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += 16) {
    store_n(out + i, mul(mul(load_n(x + i, n - i), factor), load_n(w + i, n - i)), n - i);
  }
}

void add_rows(float* x, const float* delta, int64_t n) {
  for (int64_t i = 0; i < n; i += 16)
    store_n(x + i, add(load_n(x + i, n - i), load_n(delta + i, n - i)), n - i);
}

void gated_rms_norm(const float* o, const float* z, const float* w, int64_t n, float eps, float* out) {
  const F32x16 factor = set1(1.0f / __builtin_sqrtf(dot_all(o, o, n) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += 16) {
    const F32x16 normed = mul(mul(load_n(o + i, n - i), factor), load_n(w + i, n - i));
    store_n(out + i, mul(normed, silu(load_n(z + i, n - i))), n - i);
  }
}

void l2_norm(const float* x, int64_t n, float factor, float* out) {
  const F32x16 scale = set1(factor / __builtin_sqrtf(dot_all(x, x, n) + 1e-6f));
  for (int64_t i = 0; i < n; i += 16) store_n(out + i, mul(load_n(x + i, n - i), scale), n - i);
}

float dot(const float* a, const float* b, int64_t n) { return dot_all(a, b, n); }

void rope(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i;
    const F32x16 first = load_n(x + i, n), second = load_n(x + half + i, n);
    const F32x16 c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(x + i, sub(mul(first, c), mul(second, s)), n);
    store_n(x + half + i, add(mul(second, c), mul(first, s)), n);
  }
}

void sigmoid_all(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) store_n(out + i, sigmoid(load_n(x + i, n - i)), n - i);
}

void softmax(float* x, int64_t n) {
  F32x16 largest = set1(x[0]);
  for (int64_t i = 0; i < n; ++i) largest = max(largest, set1(x[i]));
  F32x16 total = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F32x16 e = exp(sub(load_n(x + i, n - i), largest));
    store_n(x + i, e, n - i);
    total = add(total, load_n(x + i, n - i));
  }
  const F32x16 sum = set1(reduce_add(total));
  for (int64_t i = 0; i < n; i += 16) store_n(x + i, div(load_n(x + i, n - i), sum), n - i);
}
