#include "flashmoe/sampler_kernels.h"

#if defined(__aarch64__)
#include "flashmoe/simd/neon.h"

namespace flashmoe::neon {

#include "kernels/sampler/scan-inl.h"

}  // namespace flashmoe::neon

namespace flashmoe {
const SamplerKernels& sampler_kernels_neon() { return neon::kTable; }
}  // namespace flashmoe
#endif
