#include "flashmoe/cpu.h"

#include <cstdlib>
#include <stdexcept>

namespace flashmoe {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512vnni:
      return "avx512vnni";
  }
  return "unknown";
}

Isa parse_isa(const std::string& name) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512vnni}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "': choose scalar, avx2 or avx512vnni");
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas = {Isa::scalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) isas.push_back(Isa::avx2);
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) isas.push_back(Isa::avx512vnni);
#endif
  return isas;
}

IsaChoice choose_isa() {
  const std::vector<Isa> isas = supported_isas();
  const char* wanted = std::getenv("FLASHMOE_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    return {isas.back(), "the highest level this machine supports"};
  }
  for (Isa isa : isas) {
    if (std::string(wanted) == isa_name(isa)) return {isa, "FLASHMOE_CPU asks for it"};
  }
  try {
    parse_isa(wanted);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("FLASHMOE_CPU: " + std::string(error.what()));
  }
  throw std::invalid_argument("FLASHMOE_CPU=" + std::string(wanted) +
                              " is not supported by this machine: unset it");
}

}  // namespace flashmoe
