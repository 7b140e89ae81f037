// Which experts a router picks: comparisons in plain code, exponentials from the kernel table.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "flashmoe/float_ops.h"

namespace flashmoe {
namespace {

// The k largest of n values, largest first: their numbers to ids, they themselves to best.  Strictly greater
// displaces: among equals the lower number comes first.
void pick_largest(const float* value, int64_t n, int64_t k, int32_t* ids, float* best) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (found == k && !(value[i] > best[k - 1])) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && value[i] > best[at - 1]; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = value[i];
    ids[at] = static_cast<int32_t>(i);
  }
}

bool any_nan(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(x[i])) return true;
  }
  return false;
}

// Buffers of one token.
struct Scratch {
  explicit Scratch(const GroupedRouting& routing)
      : score(static_cast<size_t>(routing.experts)),
        ranked(static_cast<size_t>(routing.experts)),
        group_score(static_cast<size_t>(routing.groups)),
        best(static_cast<size_t>(std::max(routing.k, routing.groups))),
        group(static_cast<size_t>(routing.groups)) {}
  std::vector<float> score, ranked, group_score, best;
  std::vector<int32_t> group;
};

// Sets the ranking of all experts outside the best groups to minus infinity.  A group is as good as its best
// two experts together (its only one, if it has one).
void keep_groups(const GroupedRouting& routing, Scratch& scratch) {
  const int64_t size = routing.experts / routing.groups;
  for (int64_t g = 0; g < routing.groups; ++g) {
    float two[2] = {0.0f, 0.0f};
    int32_t ids[2];
    const int64_t count = size < 2 ? size : 2;
    pick_largest(scratch.ranked.data() + g * size, size, count, ids, two);
    scratch.group_score[static_cast<size_t>(g)] = two[0] + two[1];
  }
  pick_largest(scratch.group_score.data(), routing.groups, routing.topk_groups, scratch.group.data(),
               scratch.best.data());
  std::vector<float> kept(static_cast<size_t>(routing.experts), -INFINITY);
  for (int64_t i = 0; i < routing.topk_groups; ++i) {
    const int64_t first = scratch.group[static_cast<size_t>(i)] * size;
    std::copy_n(scratch.ranked.data() + first, size, kept.data() + first);
  }
  scratch.ranked = std::move(kept);
}

}  // namespace

bool FloatOps::route(const float* logits, int64_t tokens, int64_t experts, int64_t k, bool renormalise,
                     int32_t* chosen, float* weights) {
  std::atomic<bool> valid{true};
  pool_.parallel_for(tokens, [&](int64_t t) {
    const float* row = logits + t * experts;
    if (any_nan(row, experts)) valid.store(false, std::memory_order_relaxed);
    pick_largest(row, experts, k, chosen + t * k, weights + t * k);
    // Softmax over all experts, renormalised over the chosen, is the softmax over the chosen.
    if (renormalise) return kernels_.softmax(weights + t * k, k);
    std::vector<float> all(row, row + experts);
    kernels_.softmax(all.data(), experts);
    for (int64_t i = t * k; i < (t + 1) * k; ++i) weights[i] = all[static_cast<size_t>(chosen[i])];
  });
  return valid.load(std::memory_order_relaxed);
}

bool FloatOps::route_grouped(const GroupedRouting& routing, const float* logits, const float* bias,
                             int64_t tokens, int32_t* chosen, float* weights) {
  const int64_t experts = routing.experts, k = routing.k;
  std::atomic<bool> valid{true};
  pool_.parallel_for(tokens, [&](int64_t t) {
    Scratch scratch(routing);
    const float* row = logits + t * experts;
    if (any_nan(row, experts)) valid.store(false, std::memory_order_relaxed);
    kernels_.sigmoid(row, experts, scratch.score.data());
    for (size_t e = 0; e < scratch.score.size(); ++e) scratch.ranked[e] = scratch.score[e] + bias[e];
    if (routing.topk_groups < routing.groups) keep_groups(routing, scratch);
    int32_t* ids = chosen + t * k;
    pick_largest(scratch.ranked.data(), experts, k, ids, scratch.best.data());
    float total = 0.0f;
    for (int64_t i = 0; i < k; ++i) total += scratch.score[static_cast<size_t>(ids[i])];
    for (int64_t i = 0; i < k; ++i) {
      const float score = scratch.score[static_cast<size_t>(ids[i])];
      weights[t * k + i] = (routing.normalise ? score / (total + 1e-20f) : score) * routing.scale;
    }
  });
  return valid.load(std::memory_order_relaxed);
}

}  // namespace flashmoe
