#include <stdexcept>
#include <string>

#include "flashmoe/sampler_kernels.h"

namespace flashmoe {

const SamplerKernels& sampler_kernels(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return sampler_kernels_scalar();
#if defined(__x86_64__)
    case Isa::avx2:
    case Isa::avxvnni:
      return sampler_kernels_avx2();
    case Isa::avx512vnni:
      return sampler_kernels_avx512vnni();
#elif defined(__aarch64__)
    case Isa::neon:
    case Isa::dotprod:
    case Isa::i8mm:
      return sampler_kernels_neon();
#endif
    default:
      throw std::invalid_argument(std::string("no kernels for ") + isa_name(isa) + " in this build");
  }
}

}  // namespace flashmoe
