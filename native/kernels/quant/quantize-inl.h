// Activations to int8 planes; part of quant-inl.h.

FLASHMOE_INLINE float largest_of(const float* x, int group) {
  F32x16 largest = abs(load(x));
  for (int i = 16; i < group; i += 16) largest = max(largest, abs(load(x + i)));
  return reduce_max(largest);
}

FLASHMOE_INLINE float mean_square(const float* x, int64_t cols) {
  F32x16 sum = zero();
  for (int64_t i = 0; i < cols; i += 16) sum = fma(load(x + i), load(x + i), sum);
  return reduce_add(sum) / static_cast<float>(cols);
}

// A row that holds a NaN or an infinity (or values above 1e19) gives NaN, as on the f32 path: integers would
// turn it into plausible numbers, different ones in every instruction set.
void quantize_broken(int64_t cols, int group, int64_t token, const QuantizedRows& out) {
  for (int64_t g = 0; g < cols / group; ++g) {
    const int64_t at = plane_index(cols / group, out.tokens, token, g);
    __builtin_memset(out.high + at * group, 0, static_cast<size_t>(group));
    __builtin_memset(out.low + at * group, 0, static_cast<size_t>(group));
    out.fine[at] = 0;
    out.scale[at] = out.sum[at] = out.fine_sum[at] = __builtin_nanf("");
  }
}

void quantize(const float* x, int64_t cols, int group, float coarse_limit, int64_t token,
              const QuantizedRows& out) {
  const float square = mean_square(x, cols);
  if (!__builtin_isfinite(square)) return quantize_broken(cols, group, token, out);
  const float limit = coarse_limit * coarse_limit * square;
  for (int64_t g = 0; g < cols / group; ++g) {
    const float* in = x + g * group;
    const int64_t at = plane_index(cols / group, out.tokens, token, g);
    const float amax = largest_of(in, group);
    const bool fine = amax * amax > limit;
    // Below 1e-34 the reciprocal overflows; such a group is zero to any later arithmetic.
    const F32x16 inverse = set1(amax > 1e-34f ? kLevels / amax : 0.0f);
    I32x16 high_sum = i32_zero(), low_sum = i32_zero();
    for (int i = 0; i < group; i += 16) {
      const F32x16 scaled = mul(load(in + i), inverse);
      const F32x16 rounded = round_even(scaled);
      const I32x16 high = round_i32(rounded);
      store_i8(out.high + at * group + i, high);
      high_sum = i32_add(high_sum, high);
      const I32x16 low = round_i32(mul(sub(scaled, rounded), set1(kLowLevels)));
      store_i8(out.low + at * group + i, low);
      low_sum = i32_add(low_sum, low);
    }
    const float scale = amax / kLevels;
    out.fine[at] = fine;
    out.scale[at] = scale;
    // Exact up to the last product: 64 * 127 + 64 * 64 / 128 needs 20 bits.
    const float coarse_sum = reduce_add(to_f32(high_sum));
    out.fine_sum[at] = scale * (coarse_sum + reduce_add(to_f32(low_sum)) / kLowLevels);
    out.sum[at] = fine ? out.fine_sum[at] : scale * coarse_sum;
  }
}

void group_sums(const float* x, int64_t cols, int group, int64_t token, int64_t tokens, float* sum) {
  for (int64_t g = 0; g < cols / group; ++g) {
    F32x16 s = load(x + g * group);
    for (int i = 16; i < group; i += 16) s = add(s, load(x + g * group + i));
    sum[plane_index(cols / group, tokens, token, g)] = reduce_add(s);
  }
}
