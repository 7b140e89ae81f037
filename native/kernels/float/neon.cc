#include "flashmoe/float_kernels.h"

#if defined(__aarch64__)
#include "flashmoe/simd/neon.h"

namespace flashmoe::neon {

#define FLASHMOE_REGISTERS 8  // a vector of 16 lanes takes four of 32
#include "kernels/float/table-inl.h"

}  // namespace flashmoe::neon

namespace flashmoe {
const FloatKernels& float_kernels_neon() { return neon::kTable; }
}  // namespace flashmoe
#endif
