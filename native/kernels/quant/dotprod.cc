#include "flashmoe/quant_kernels.h"

#if defined(__aarch64__)
#include "flashmoe/simd/neon.h"

FLASHMOE_TARGET_BEGIN_DOTPROD
namespace flashmoe::dotprod {
namespace {

using namespace flashmoe::neon;

FLASHMOE_INLINE int32x4_t dot16(int32x4_t acc, int8x16_t codes, int8x16_t x) {
  return vdotq_s32(acc, codes, x);
}
// Low and high nibble apart: signed bytes end at 127.
FLASHMOE_INLINE int32x4_t dot16_wide(int32x4_t acc, uint8x16_t codes, int8x16_t x) {
  const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(0x0f)));
  const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
  return vaddq_s32(dot16(acc, low, x), vshlq_n_s32(dot16(vdupq_n_s32(0), high, x), 4));
}

#include "kernels/quant/neon-inl.h"

}  // namespace

#include "kernels/quant/quant-inl.h"

}  // namespace flashmoe::dotprod
FLASHMOE_TARGET_END

namespace flashmoe {
const QuantKernels& quant_kernels_dotprod() { return dotprod::kTable; }
}  // namespace flashmoe
#endif
