// Array arguments that are taken as they are.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>

namespace flashmoe {

// "x"_array instead of "x"_a: nanobind would copy an array of another dtype or layout into one that fits, and
// results written to the copy would be lost without a word.
inline auto operator""_array(const char* name, size_t) { return nanobind::arg(name).noconvert(); }

}  // namespace flashmoe
