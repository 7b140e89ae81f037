#include "flashmoe/simd/scalar.h"
#include "flashmoe/float_kernels.h"

namespace flashmoe::scalar {

#include "kernels/float/table-inl.h"

}  // namespace flashmoe::scalar

namespace flashmoe {
const FloatKernels& float_kernels_scalar() { return scalar::kTable; }
}  // namespace flashmoe
