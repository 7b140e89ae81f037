#include "flashmoe/cpu.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace flashmoe {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2,    Isa::avxvnni, Isa::avx512vnni,
                        Isa::neon,   Isa::dotprod, Isa::i8mm};

#if defined(__aarch64__)
#if defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
// Bits of AT_HWCAP and AT_HWCAP2 (Linux, Documentation/arch/arm64/elf_hwcaps.rst).
bool has_dotprod() { return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) & (1ul << 13)) != 0; }
#endif
#endif

}  // namespace

bool has_avxvnni() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;  // leaf 7, subleaf 1: EAX bit 4
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avxvnni:
      return "avxvnni";
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::neon:
      return "neon";
    case Isa::dotprod:
      return "dotprod";
    case Isa::i8mm:
      return "i8mm";
  }
  return "unknown";
}

Isa parse_isa(const std::string& name) {
  std::string names;
  for (Isa isa : kAll) {
    if (name == isa_name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("unknown instruction set '" + name + "': choose one of " + names);
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
  if (avx2 && (avx512 || has_avxvnni())) isas.push_back(Isa::avxvnni);
  if (avx2 && avx512) isas.push_back(Isa::avx512vnni);
#elif defined(__aarch64__)
  isas.push_back(Isa::neon);
  if (has_dotprod()) isas.push_back(Isa::dotprod);
  if (has_dotprod() && has_i8mm()) isas.push_back(Isa::i8mm);
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
