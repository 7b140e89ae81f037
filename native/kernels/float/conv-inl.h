// Causal convolution; included once per instruction set.

// Rows lie 32 KiB apart at the 35B shape: walking along them, 2 KiB at a time, keeps the rows above and the
// weights in the first-level cache and follows the memory's order.
constexpr int64_t kConvChannels = 512;

FLASHMOE_INLINE const float* conv_row(const ConvTask& p, int64_t row) {
  return row < 0 ? p.state + (row + p.taps - 1) * p.channels : p.u + row * p.channels;
}

// taps: p.taps, as a constant where the caller has one.
FLASHMOE_INLINE void conv_columns(const ConvTask& p, int64_t taps, int64_t t, int64_t c, int64_t n) {
  F32x16 acc = zero();
  FLASHMOE_UNROLL(4)
  for (int64_t j = 0; j < taps; ++j) {
    const float* x = conv_row(p, t + j - taps + 1);
    acc = fma(load_n(p.w + j * p.channels + c, n), load_n(x + c, n), acc);
  }
  store_n(p.out + t * p.channels + c, silu(acc), n);
}

// Four taps (every model so far) and whole vectors.
FLASHMOE_INLINE void conv4_row(const ConvTask& p, int64_t t, int64_t begin, int64_t end) {
  // In variables of their own: a store could change what the task points to.
  const float *x0 = conv_row(p, t - 3), *x1 = conv_row(p, t - 2), *x2 = conv_row(p, t - 1),
              *x3 = conv_row(p, t);
  const float *w0 = p.w, *w1 = w0 + p.channels, *w2 = w1 + p.channels, *w3 = w2 + p.channels;
  float* out = p.out + t * p.channels;
  for (int64_t c = begin; c < end; c += 16) {
    F32x16 acc = fma(load(w0 + c), load(x0 + c), zero());
    acc = fma(load(w1 + c), load(x1 + c), acc);
    acc = fma(load(w2 + c), load(x2 + c), acc);
    acc = fma(load(w3 + c), load(x3 + c), acc);
    store(out + c, silu(acc));
  }
}

void causal_conv(const ConvTask& p) {
  for (int64_t begin = p.first_channel; begin < p.end_channel; begin += kConvChannels) {
    const int64_t end = begin + kConvChannels < p.end_channel ? begin + kConvChannels : p.end_channel;
    for (int64_t t = p.first_token; t < p.end_token; ++t) {
      const int64_t whole = p.taps == 4 ? begin + (end - begin) / 16 * 16 : begin;
      if (whole > begin) conv4_row(p, t, begin, whole);
      for (int64_t c = whole; c < end; c += 16) conv_columns(p, p.taps, t, c, end - c);
    }
  }
}
