#include "flashmoe/simd/scalar.h"
#include "flashmoe/float_kernels.h"

namespace flashmoe::scalar {

// One copy of the attention for each small number of rows.
#define FLASHMOE_SPECIALISED false
#include "kernels/float/table-inl.h"

}  // namespace flashmoe::scalar

namespace flashmoe {
const FloatKernels& float_kernels_scalar() { return scalar::kTable; }
}  // namespace flashmoe
