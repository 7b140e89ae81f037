// A layer's experts when all are in memory: pairs are grouped here instead of by the caller.
#include <algorithm>
#include <stdexcept>

#include "flashmoe/quant_ops.h"

namespace flashmoe {

// The pairs of `call` by ascending expert and then token, behind those of the shared block.
int64_t QuantOps::group_pairs(const RoutedFfn& call) {
  const int64_t tokens = call.input->tokens(), pairs = tokens * call.experts_per_token;
  const size_t experts = call.addresses.size();
  routed_.starts.assign(experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t expert = call.chosen[p];
    if (expert < 0 || static_cast<size_t>(expert) >= experts ||
        call.addresses[static_cast<size_t>(expert)] == 0) {
      throw std::invalid_argument("an expert is out of range or not in memory");
    }
    ++routed_.starts[static_cast<size_t>(expert) + 1];
  }
  const int64_t shared = call.shared != nullptr ? tokens : 0;
  routed_.tokens.resize(static_cast<size_t>(shared + pairs));
  routed_.weights.resize(static_cast<size_t>(shared + pairs));
  routed_.jobs.clear();
  for (int64_t t = 0; t < shared; ++t) {
    routed_.tokens[static_cast<size_t>(t)] = static_cast<int32_t>(t);
    routed_.weights[static_cast<size_t>(t)] = call.shared_weights[t];
  }
  if (shared > 0)
    routed_.jobs.push_back({call.shared->layout, call.shared->input, call.shared->record, 0, shared, true});
  int64_t distinct = 0, at = shared;
  for (size_t e = 0; e < experts; ++e) {
    const int64_t count = routed_.starts[e + 1];
    routed_.starts[e] = at;
    if (count == 0) continue;
    routed_.jobs.push_back(
        {call.layout, call.input, reinterpret_cast<const uint8_t*>(call.addresses[e]), at, count, false});
    at += count;
    ++distinct;
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const size_t to = static_cast<size_t>(routed_.starts[static_cast<size_t>(call.chosen[p])]++);
    routed_.tokens[to] = static_cast<int32_t>(p / call.experts_per_token);
    routed_.weights[to] = call.weights[p];
  }
  return distinct;
}

int64_t QuantOps::routed_ffn(const RoutedFfn& call, float* out) {
  const int64_t distinct = group_pairs(call);
  const std::span<const int32_t> tokens(routed_.tokens);
  const std::span<const float> weights(routed_.weights);
  const std::span<ExpertJob> jobs(routed_.jobs);
  for (size_t begin = 0, end = 0; begin < jobs.size(); begin = end) {
    const int64_t first = jobs[begin].first;
    int64_t pairs = 0;
    do {
      jobs[end].first -= first;
      pairs += jobs[end++].count;
    } while (end < jobs.size() && pairs + jobs[end].count <= call.most_pairs);
    const size_t from = static_cast<size_t>(first), count = static_cast<size_t>(pairs);
    expert_ffn(jobs.subspan(begin, end - begin), tokens.subspan(from, count), tokens.subspan(from, count),
               weights.subspan(from, count), out);
  }
  return distinct;
}

}  // namespace flashmoe
