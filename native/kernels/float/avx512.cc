#include "flashmoe/float_kernels.h"

#if defined(__x86_64__)
#include "flashmoe/simd/avx512.h"

FLASHMOE_TARGET_BEGIN_AVX512
namespace flashmoe::avx512 {

#define FLASHMOE_REGISTERS 32
#include "kernels/float/table-inl.h"

}  // namespace flashmoe::avx512
FLASHMOE_TARGET_END

namespace flashmoe {
const FloatKernels& float_kernels_avx512vnni() { return avx512::kTable; }
}  // namespace flashmoe
#endif
