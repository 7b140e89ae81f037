#include "flashmoe/simd/scalar.h"
#include "flashmoe/float_kernels.h"

namespace flashmoe::scalar {

#define FLASHMOE_REGISTERS 1
#include "kernels/float/table-inl.h"

}  // namespace flashmoe::scalar

namespace flashmoe {
const FloatKernels& float_kernels_scalar() { return scalar::kTable; }
}  // namespace flashmoe
