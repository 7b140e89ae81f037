#include "flashmoe/sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace flashmoe {
namespace {

// Below e^-35 of the largest a candidate's probability is lost in the rounding of the sum (2^-53 = e^-36.7).
constexpr float kNegligible = 35.0f;

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a full-period mix of a counter.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Uniform in [0, 1) with 53 bits.
double uniform(uint64_t seed, uint64_t counter) {
  return static_cast<double>(mix(mix(seed) + counter) >> 11) * 0x1p-53;
}

}  // namespace

void Sampler::observe_prompt(std::span<const int32_t> ids) {
  if (settings_.repetition_penalty == 1.0f) return;
  for (int32_t id : ids) generated_.try_emplace(id, 0);
}

void Sampler::penalise(std::span<float> logits) const {
  for (const auto& [id, count] : generated_) {
    if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
    float& logit = logits[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / settings_.repetition_penalty : logit * settings_.repetition_penalty;
    if (count > 0) {
      logit -= settings_.presence_penalty + settings_.frequency_penalty * static_cast<float>(count);
    }
  }
}

// Candidates: allowed tokens that could still matter, unordered, logits divided by the temperature.
void Sampler::gather(std::span<const float> logits, std::span<const uint32_t> allowed) {
  const auto is_allowed = [&](size_t id) {
    return allowed.empty() || ((allowed[id / 32] >> (id % 32)) & 1u) != 0;
  };
  float largest = -INFINITY;
  bool any = false;
  for (size_t id = 0; id < logits.size(); ++id) {
    if (std::isnan(logits[id])) throw std::runtime_error("a logit is not a number");
    if (!is_allowed(id)) continue;
    any = true;
    largest = std::max(largest, logits[id]);
  }
  if (!any) throw std::runtime_error("no token is allowed here");
  if (std::isinf(largest)) throw std::runtime_error("the largest allowed logit is infinite");
  const bool greedy = settings_.temperature == 0.0f;
  const float limit = greedy ? largest : largest - kNegligible * settings_.temperature;
  candidates_.clear();
  for (size_t id = 0; id < logits.size(); ++id) {
    if (logits[id] >= limit && is_allowed(id)) {
      candidates_.push_back(
          {greedy ? logits[id] : logits[id] / settings_.temperature, static_cast<int32_t>(id)});
      if (greedy) return;
    }
  }
}

void Sampler::keep_top_k() {
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const size_t k = settings_.top_k > 0 ? static_cast<size_t>(settings_.top_k) : candidates_.size();
  if (k < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(k),
                     candidates_.end(), before);
    candidates_.resize(k);
  }
  std::sort(candidates_.begin(), candidates_.end(), before);
}

// Top-p over the probabilities of what is left, then min-p; fills weights_ (unnormalised).
void Sampler::keep_probable() {
  weights_.clear();
  double total = 0.0;
  for (const Candidate& candidate : candidates_) {
    weights_.push_back(std::exp(double{candidate.logit} - double{candidates_.front().logit}));
    total += weights_.back();
  }
  size_t kept = 0;
  double sum = 0.0;
  // The token that crosses top_p stays in.
  while (kept < weights_.size() && (kept == 0 || sum < settings_.top_p * total)) sum += weights_[kept++];
  while (kept > 1 && weights_[kept - 1] < settings_.min_p) --kept;  // the largest weight is 1
  weights_.resize(kept);
}

int32_t Sampler::draw() {
  double total = 0.0;
  for (double weight : weights_) total += weight;
  const double target = uniform(settings_.seed, drawn_) * total;
  double sum = 0.0;
  size_t chosen = 0;
  for (; chosen + 1 < weights_.size(); ++chosen) {
    sum += weights_[chosen];
    if (target < sum) break;
  }
  probability_ = weights_[chosen] / total;
  return candidates_[chosen].id;
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const uint32_t> allowed) {
  if (logits.empty()) throw std::runtime_error("there are no logits to sample from");
  if (!allowed.empty() && allowed.size() * 32 < logits.size()) {
    throw std::invalid_argument("the mask of allowed tokens is shorter than the vocabulary");
  }
  std::span<const float> seen = logits;
  if (!generated_.empty()) {
    logits_.assign(logits.begin(), logits.end());
    penalise(logits_);
    seen = logits_;
  }
  gather(seen, allowed);
  keep_top_k();
  keep_probable();
  const int32_t id = draw();
  ++drawn_;
  const bool counted = settings_.repetition_penalty != 1.0f || settings_.presence_penalty != 0.0f ||
                       settings_.frequency_penalty != 0.0f;
  if (counted) ++generated_[id];
  return id;
}

}  // namespace flashmoe
