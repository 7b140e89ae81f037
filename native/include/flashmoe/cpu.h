// Instruction-set levels and the choice among them.
#pragma once

#include <string>
#include <vector>

namespace flashmoe {

enum class Isa { scalar = 0, avx2 = 1, avx512vnni = 2 };

const char* isa_name(Isa isa);

// Level named `name`; throws std::invalid_argument for an unknown name.
Isa parse_isa(const std::string& name);

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
