#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "array_args.h"
#include "flashmoe/cpu.h"
#include "flashmoe/sampler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

using Logits = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int32_t sample(Sampler& self, const Logits& logits, const std::optional<Mask>& allowed) {
  std::span<const uint32_t> mask;
  if (allowed) mask = {allowed->data(), allowed->size()};
  // An empty span means that every token is allowed; an empty array allows none.
  if (allowed && mask.empty()) throw std::invalid_argument("the mask of allowed tokens is empty");
  nb::gil_scoped_release release;
  return self.sample({logits.data(), logits.size()}, mask);
}

// (log of the sum of e^logit, ids, their logits)
auto best_logprobs(const Logits& logits, int64_t count) {
  if (count < 0) throw std::invalid_argument("count must not be negative");
  nb::gil_scoped_release release;
  const TopLogprobs top = top_logprobs({logits.data(), logits.size()}, count, choose_isa().isa);
  std::vector<int32_t> ids;
  std::vector<float> values;
  for (const auto& [id, logit] : top.best) {
    ids.push_back(id);
    values.push_back(logit);
  }
  return std::make_tuple(top.log_sum, ids, values);
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler")
      .def(
          "__init__",
          [](Sampler* self, float temperature, int64_t top_k, float top_p, float min_p,
             float presence_penalty, float frequency_penalty, float repetition_penalty, uint64_t seed) {
            new (self) Sampler({temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty,
                                repetition_penalty, seed},
                               choose_isa().isa);
          },
          "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "presence_penalty"_a, "frequency_penalty"_a,
          "repetition_penalty"_a, "seed"_a)
      .def(
          "observe_prompt",
          [](Sampler& self, const Ids& ids) { self.observe_prompt({ids.data(), ids.size()}); }, "ids"_array)
      .def("sample", &sample, "logits"_array, "allowed"_array = nb::none())
      .def_prop_ro("probability", &Sampler::probability);
  m.def("top_logprobs", &best_logprobs, "logits"_array, "count"_a);
}

}  // namespace flashmoe
