#include "flashmoe/float_kernels.h"

#if defined(__aarch64__)
#include "flashmoe/simd/neon.h"

namespace flashmoe::neon {

// One copy of the attention for each small number of rows.
#define FLASHMOE_SPECIALISED true
#include "kernels/float/table-inl.h"

}  // namespace flashmoe::neon

namespace flashmoe {
const FloatKernels& float_kernels_neon() { return neon::kTable; }
}  // namespace flashmoe
#endif
