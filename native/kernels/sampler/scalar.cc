#include "flashmoe/simd/scalar.h"
#include "flashmoe/sampler_kernels.h"

namespace flashmoe::scalar {

#include "kernels/sampler/scan-inl.h"

}  // namespace flashmoe::scalar

namespace flashmoe {
const SamplerKernels& sampler_kernels_scalar() { return scalar::kTable; }
}  // namespace flashmoe
