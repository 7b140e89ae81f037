#include "flashmoe/float_kernels.h"

#if defined(__x86_64__)
#include "flashmoe/simd/avx2.h"

FLASHMOE_TARGET_BEGIN_AVX2
namespace flashmoe::avx2 {

// One copy of the attention for each small number of rows.
#define FLASHMOE_SPECIALISED true
#include "kernels/float/table-inl.h"

}  // namespace flashmoe::avx2
FLASHMOE_TARGET_END

namespace flashmoe {
const FloatKernels& float_kernels_avx2() { return avx2::kTable; }
}  // namespace flashmoe
#endif
