// Functions of F32x16 that are the same in every instruction set; included inside each namespace.
// No include guard: one inclusion per instruction set is the point.

// e^x with a relative error below 2e-7; 0 below -87 (no subnormals), saturating at e^88, NaN of NaN.
// Cody-Waite reduction to [-ln2/2, ln2/2] and the Taylor polynomial of degree 7, whose remainder is
// (ln2/2)^8 / 8! = 5e-9.
FLASHMOE_INLINE F32x16 exp(F32x16 x) {
  // min and max give their second operand when one is NaN: in this order a NaN goes through.
  const F32x16 clamped = max(set1(-87.0f), min(set1(88.0f), x));
  const F32x16 n = round_even(mul(clamped, set1(1.44269504f)));
  F32x16 r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F32x16 p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return zero_where_below(mul(p, exp2_integer(n)), x, -87.0f);
}

FLASHMOE_INLINE F32x16 sigmoid(F32x16 x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

FLASHMOE_INLINE F32x16 silu(F32x16 x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }
