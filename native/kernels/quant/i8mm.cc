#include "flashmoe/quant_kernels.h"

#if defined(__aarch64__)
#include "flashmoe/simd/neon.h"

FLASHMOE_TARGET_BEGIN_I8MM
namespace flashmoe::i8mm {
namespace {

using namespace flashmoe::neon;

FLASHMOE_INLINE int32x4_t dot16(int32x4_t acc, int8x16_t codes, int8x16_t x) {
  return vdotq_s32(acc, codes, x);
}
FLASHMOE_INLINE int32x4_t dot16_wide(int32x4_t acc, uint8x16_t codes, int8x16_t x) {
  return vusdotq_s32(acc, codes, x);
}

#include "kernels/quant/neon-inl.h"

}  // namespace

#include "kernels/quant/quant-inl.h"

}  // namespace flashmoe::i8mm
FLASHMOE_TARGET_END

namespace flashmoe {
const QuantKernels& quant_kernels_i8mm() { return i8mm::kTable; }
}  // namespace flashmoe
#endif
