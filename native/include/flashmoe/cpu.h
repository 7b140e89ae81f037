// Instruction-set levels and the choice among them.
#pragma once

#include <string>
#include <vector>

namespace flashmoe {

// avxvnni: 256-bit vectors with dot products, in whichever encoding the processor has.
enum class Isa { scalar, avx2, avxvnni, avx512vnni, neon, dotprod, i8mm };

const char* isa_name(Isa isa);

// Level named `name`; throws std::invalid_argument for an unknown name.
Isa parse_isa(const std::string& name);

// Whether the processor has the dot products of AVX-VNNI (not those of AVX-512).
bool has_avxvnni();

// Levels this machine can execute, ascending; scalar is always among them.
std::vector<Isa> supported_isas();

struct IsaChoice {
  Isa isa;
  std::string reason;
};

// Highest supported level, lowered by the environment variable FLASHMOE_CPU.
// Throws std::invalid_argument when the variable names an unknown or unsupported level.
IsaChoice choose_isa();

}  // namespace flashmoe
