#include "flashmoe/float_kernels.h"

#if defined(__x86_64__)
#include "flashmoe/simd/avx2.h"

FLASHMOE_TARGET_BEGIN_AVX2
namespace flashmoe::avx2 {

#define FLASHMOE_REGISTERS 8
#include "kernels/float/table-inl.h"

}  // namespace flashmoe::avx2
FLASHMOE_TARGET_END

namespace flashmoe {
const FloatKernels& float_kernels_avx2() { return avx2::kTable; }
}  // namespace flashmoe
#endif
