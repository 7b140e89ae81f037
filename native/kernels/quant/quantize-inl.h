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

// Where group g of a token goes.
struct PlanePlace {
  int64_t high;  // rows
  int64_t low;
  int64_t at;  // plane_index
  uint8_t token;
};

FLASHMOE_INLINE PlanePlace plane_place(int64_t groups, int64_t tokens, int64_t token, int64_t g) {
  const int64_t first = token / kTokenBlock * kTokenBlock, left = tokens - first;
  const int64_t count = left < kTokenBlock ? left : kTokenBlock;
  const int64_t high = first_row(groups, first, count, g) + token - first;
  return {high, high + count, plane_index(groups, tokens, token, g), static_cast<uint8_t>(token - first)};
}

FLASHMOE_INLINE void describe_planes(const PlaneRows& out, const PlanePlace& place, float scale, bool fine,
                                     float sum, float fine_sum) {
  out.fine[place.at] = fine;
  out.low_at[place.at] = out.token[place.high] = out.token[place.low] = place.token;
  out.scale[place.high] = scale;
  out.scale[place.low] = scale * (1.0f / kLowLevels);
  out.sum[place.high] = sum;
  out.fine_sum[place.high] = fine_sum;
  out.sum[place.low] = out.fine_sum[place.low] = 0.0f;
}

// A row that holds a NaN or an infinity (or values above 1e19) gives NaN, as on the f32 path: integers would
// turn it into plausible numbers, different ones in every instruction set.
void quantize_broken(int64_t cols, int group, int64_t token, const PlaneRows& out) {
  const float nan = __builtin_nanf("");
  for (int64_t g = 0; g < cols / group; ++g) {
    const PlanePlace place = plane_place(cols / group, out.tokens, token, g);
    __builtin_memset(out.codes + place.high * group, 0, static_cast<size_t>(group));
    __builtin_memset(out.codes + place.low * group, 0, static_cast<size_t>(group));
    describe_planes(out, place, nan, false, nan, nan);
  }
}

void quantize(const float* x, int64_t cols, int group, float coarse_limit, int64_t token,
              const PlaneRows& out) {
  const float square = mean_square(x, cols);
  if (!__builtin_isfinite(square)) return quantize_broken(cols, group, token, out);
  const float limit = coarse_limit * coarse_limit * square;
  for (int64_t g = 0; g < cols / group; ++g) {
    const float* in = x + g * group;
    const PlanePlace place = plane_place(cols / group, out.tokens, token, g);
    const float amax = largest_of(in, group);
    const bool fine = amax * amax > limit;
    // Below 1e-34 the reciprocal overflows; such a group is zero to any later arithmetic.
    const F32x16 inverse = set1(amax > 1e-34f ? kLevels / amax : 0.0f);
    I32x16 high_sum = i32_zero(), low_sum = i32_zero();
    for (int i = 0; i < group; i += 16) {
      const F32x16 scaled = mul(load(in + i), inverse);
      const F32x16 rounded = round_even(scaled);
      const I32x16 high = round_i32(rounded);
      store_i8(out.codes + place.high * group + i, high);
      high_sum = i32_add(high_sum, high);
      const I32x16 low = round_i32(mul(sub(scaled, rounded), set1(kLowLevels)));
      store_i8(out.codes + place.low * group + i, low);
      low_sum = i32_add(low_sum, low);
    }
    const float scale = amax / kLevels;
    // Exact up to the last product: 64 * 127 + 64 * 64 / 128 needs 20 bits.
    const float coarse_sum = reduce_add(to_f32(high_sum));
    const float fine_sum = scale * (coarse_sum + reduce_add(to_f32(low_sum)) / kLowLevels);
    describe_planes(out, place, scale, fine, fine ? fine_sum : scale * coarse_sum, fine_sum);
  }
}

void group_sums(const float* x, int64_t cols, int group, int64_t token, int64_t tokens, float* sum) {
  for (int64_t g = 0; g < cols / group; ++g) {
    F32x16 s = load(x + g * group);
    for (int i = 16; i < group; i += 16) s = add(s, load(x + g * group + i));
    sum[plane_index(cols / group, tokens, token, g)] = reduce_add(s);
  }
}
