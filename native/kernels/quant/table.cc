#include <stdexcept>
#include <string>

#include "flashmoe/quant_kernels.h"

namespace flashmoe {

const QuantKernels& quant_kernels(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return quant_kernels_scalar();
#if defined(__x86_64__)
    case Isa::avx2:
      return quant_kernels_avx2();
    case Isa::avxvnni:
      return has_avxvnni() ? quant_kernels_avxvnni() : quant_kernels_avx512vl();
    case Isa::avx512vnni:
      return quant_kernels_avx512vnni();
#elif defined(__aarch64__)
    case Isa::neon:
      return quant_kernels_neon();
    case Isa::dotprod:
      return quant_kernels_dotprod();
    case Isa::i8mm:
      return quant_kernels_i8mm();
#endif
    default:
      throw std::invalid_argument(std::string("no kernels for ") + isa_name(isa) + " in this build");
  }
}

}  // namespace flashmoe
