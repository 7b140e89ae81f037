#include "flashmoe/float_kernels.h"
#include "flashmoe/simd/scalar.h"

namespace flashmoe::scalar {

#include "kernels/float/table-inl.h"

}  // namespace flashmoe::scalar

namespace flashmoe {
const FloatKernels& float_kernels_scalar() { return scalar::kTable; }
}  // namespace flashmoe
