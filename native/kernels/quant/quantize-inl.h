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

alignas(64) constexpr float kZeros[64] = {};

// A token's values of one group, and what they are multiplied by.
struct PlaneSource {
  const float* in;
  int group;
  float inverse;
};

// Codes of the high plane; returns their sum, which is exact.
FLASHMOE_INLINE float put_high(const PlaneSource& source, int8_t* codes) {
  I32x16 sum = i32_zero();
  for (int i = 0; i < source.group; i += 16) {
    const I32x16 high = round_i32(round_even(mul(load(source.in + i), set1(source.inverse))));
    store_i8(codes + i, high);
    sum = i32_add(sum, high);
  }
  return reduce_add(to_f32(sum));
}

// As put_high, of the low plane.
FLASHMOE_INLINE float put_low(const PlaneSource& source, int8_t* codes) {
  I32x16 sum = i32_zero();
  for (int i = 0; i < source.group; i += 16) {
    const F32x16 scaled = mul(load(source.in + i), set1(source.inverse));
    const I32x16 low = round_i32(mul(sub(scaled, round_even(scaled)), set1(kLowLevels)));
    store_i8(codes + i, low);
    sum = i32_add(sum, low);
  }
  return reduce_add(to_f32(sum));
}

// Where a group's planes of a block of tokens go.
struct GroupPlanes {
  int64_t first_row;
  int64_t tokens;   // of the block
  int64_t at;       // plane_index of the first of them
  uint8_t* marked;  // low planes that count so far
};

// Token t's planes of one group; limit: of a square, NaN for a row that is broken.
FLASHMOE_INLINE void put_planes(const FloatRows& x, const float* in, int64_t t, float limit,
                                const GroupPlanes& to, const PlaneRows& out) {
  const bool broken = limit != limit;
  const float amax = broken ? limit : largest_of(in, x.group);
  const bool fine = amax * amax > limit;
  // Below 1e-34 the reciprocal overflows; such a group is zero to any later arithmetic.
  const PlaneSource source{broken ? kZeros : in, x.group, amax > 1e-34f ? kLevels / amax : 0.0f};
  const int64_t high = to.first_row + t;
  int8_t* codes = out.codes + high * x.group;
  // The next token's: another core may have these lines, and a store that has to fetch its line stalls.
  if (t + 1 < to.tokens) __builtin_prefetch(codes + x.group, 1);
  const float scale = amax / kLevels, coarse_sum = put_high(source, codes);
  out.token[high] = static_cast<uint8_t>(t);
  out.scale[high] = scale;
  out.sum[high] = scale * coarse_sum;
  out.fine[to.at + t] = fine;
  if (!fine && !x.every) return;
  const int64_t slot = fine ? (*to.marked)++ : to.tokens - 1 - (t - *to.marked);
  const int64_t low = to.first_row + to.tokens + slot;
  // Exact up to the last product: 64 * 127 + 64 * 64 / 128 needs 20 bits.
  const float fine_sum = scale * (coarse_sum + put_low(source, out.codes + low * x.group) / kLowLevels);
  if (fine) out.sum[high] = fine_sum;
  out.fine_sum[high] = fine_sum;
  out.low_at[to.at + t] = static_cast<uint8_t>(slot);
  out.token[low] = static_cast<uint8_t>(t);
  out.scale[low] = scale * (1.0f / kLowLevels);
  out.sum[low] = out.fine_sum[low] = 0.0f;
}

// A row that holds a NaN or an infinity (or values above 1e19) gives NaN, as on the f32 path: integers would
// turn it into plausible numbers, different ones in every instruction set.
FLASHMOE_INLINE float square_limit(const float* x, int64_t cols, float coarse_limit) {
  const float square = mean_square(x, cols);
  return __builtin_isfinite(square) ? coarse_limit * coarse_limit * square : __builtin_nanf("");
}

void quantize(const FloatRows& x, int64_t first, int64_t begin, int64_t end, const PlaneRows& out) {
  const int64_t groups = x.cols / x.group, left = out.tokens - first;
  const int64_t tokens = left < kTokenBlock ? left : kTokenBlock;
  uint8_t marked[kMaxGroups];  // apart from other threads' counts until all are known
  __builtin_memset(marked, 0, static_cast<size_t>(end - begin));
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = x.x + (first + t) * x.stride;
    const float limit = square_limit(row, x.cols, x.coarse_limit);
    for (int64_t g = begin; g < end; ++g) {
      const GroupPlanes to{first_row(groups, first, tokens, g), tokens,
                           plane_index(groups, out.tokens, first, g), marked + (g - begin)};
      put_planes(x, row + g * x.group, t, limit, to, out);
    }
  }
  __builtin_memcpy(out.marked + first / kTokenBlock * groups + begin, marked,
                   static_cast<size_t>(end - begin));
}

void group_sums(const float* x, int64_t cols, int group, int64_t token, int64_t tokens, float* sum) {
  for (int64_t g = 0; g < cols / group; ++g) {
    F32x16 s = load(x + g * group);
    for (int i = 16; i < group; i += 16) s = add(s, load(x + g * group + i));
    sum[plane_index(cols / group, tokens, token, g)] = reduce_add(s);
  }
}
