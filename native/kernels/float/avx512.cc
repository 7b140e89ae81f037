#include "flashmoe/float_kernels.h"

#if defined(__x86_64__)
#include "flashmoe/simd/avx512.h"

FLASHMOE_TARGET_BEGIN_AVX512
namespace flashmoe::avx512 {

// One copy of the attention for each small number of rows.
#define FLASHMOE_SPECIALISED true
#include "kernels/float/table-inl.h"

}  // namespace flashmoe::avx512
FLASHMOE_TARGET_END

namespace flashmoe {
const FloatKernels& float_kernels_avx512vnni() { return avx512::kTable; }
}  // namespace flashmoe
#endif
