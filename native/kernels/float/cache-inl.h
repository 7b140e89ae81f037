// Elements of a key/value cache; included once per instruction set.

FLASHMOE_INLINE F32x16 load_elements(const float* p) { return load(p); }
FLASHMOE_INLINE F32x16 load_elements(const uint16_t* p) { return load_f16(p); }
FLASHMOE_INLINE F32x16 load_elements(const int8_t* p) { return load_i8(p); }

FLASHMOE_INLINE const float* cache_scales(const CacheView& cache, const uint8_t* block) {
  return reinterpret_cast<const float*>(block + cache.codes_nbytes());
}

// n values as they are cached, `step` elements apart; those beyond n up to the end of the vector are zero.
FLASHMOE_INLINE void put_elements(const CacheView& cache, uint8_t* to, int64_t step, F32x16 x) {
  if (cache.type == CacheType::f32) {
    float lane[16];
    store(lane, x);
    for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + 4 * i * step, lane + i, 4);
  } else if (cache.type == CacheType::f16) {
    uint16_t lane[16];
    store_f16(lane, x);
    for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + 2 * i * step, lane + i, 2);
  } else {
    float lane[16];
    store(lane, round_even(x));
    for (int64_t i = 0; i < 16; ++i) {
      const int8_t code = static_cast<int8_t>(lane[i]);
      __builtin_memcpy(to + i * step, &code, 1);
    }
  }
}

// Codes of one group: x / scale with scale = max|x| / 127; a group that is not finite gets the scale NaN.
FLASHMOE_INLINE float group_scale(const float* x, int64_t n) {
  F32x16 largest = zero(), check = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F32x16 v = load_n(x + i, n - i);
    largest = max(largest, abs(v));
    check = fma(v, zero(), check);
  }
  return reduce_max(largest) / 127.0f + reduce_add(check);
}

// lane_step: elements between two values of the vector; at: where value 0 of the position goes.
FLASHMOE_INLINE void store_position(const CacheView& cache, uint8_t* block, int64_t lane, int64_t at,
                                    int64_t step, const float* x) {
  const int64_t dim = cache.head_dim, size = cache.element_nbytes();
  const int64_t width = cache.type == CacheType::int8 ? kCacheScaleGroup : dim;
  for (int64_t begin = 0; begin < dim; begin += width) {
    const int64_t end = begin + width < dim ? begin + width : dim;
    float inverse = 1.0f;
    if (cache.type == CacheType::int8) {
      const float scale = group_scale(x + begin, end - begin);
      float* scales = reinterpret_cast<float*>(block + cache.codes_nbytes());
      scales[begin / width * kCachePositions + lane] = scale;
      // Not-a-number, zero and scales whose inverse overflows: codes of zero.
      inverse = scale > 1e-37f ? 1.0f / scale : 0.0f;
    }
    for (int64_t i = begin; i < end; i += 16) {
      F32x16 v = load_n(x + i, end - i);
      if (cache.type == CacheType::int8) v = inverse > 0.0f ? mul(v, set1(inverse)) : zero();
      put_elements(cache, block + (at + i * step) * size, step, v);
    }
  }
}

void store_key(const CacheView& cache, int64_t kv_head, int64_t position, const float* x) {
  const int64_t lane = position % kCachePositions;
  store_position(cache, cache.block(kv_head, position), lane, lane, kCachePositions, x);
}

void store_value(const CacheView& cache, int64_t kv_head, int64_t position, const float* x) {
  const int64_t lane = position % kCachePositions;
  store_position(cache, cache.block(kv_head, position), lane, lane * CacheView::padded(cache.head_dim), 1, x);
}
