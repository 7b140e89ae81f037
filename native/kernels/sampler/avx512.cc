#include "flashmoe/sampler_kernels.h"

#if defined(__x86_64__)
#include "flashmoe/simd/avx512.h"

FLASHMOE_TARGET_BEGIN_AVX512
namespace flashmoe::avx512 {

#include "kernels/sampler/scan-inl.h"

}  // namespace flashmoe::avx512
FLASHMOE_TARGET_END

namespace flashmoe {
const SamplerKernels& sampler_kernels_avx512vnni() { return avx512::kTable; }
}  // namespace flashmoe
#endif
