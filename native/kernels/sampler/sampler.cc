#include "flashmoe/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace flashmoe {
namespace {

// Below e^-35 of the largest a candidate's probability is lost in the rounding of the sum (2^-53 = e^-36.7).
constexpr float kNegligible = 35.0f;
// A smaller temperature would have an infinite inverse; it is greedy already at differences of 1e-28.
constexpr float kSmallestTemperature = 1e-30f;

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a full-period mix of a counter.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

float above(float x) { return std::nextafter(x, std::numeric_limits<float>::infinity()); }

double total_of(const std::vector<float>& sums) { return std::accumulate(sums.begin(), sums.end(), 0.0); }

}  // namespace

Sampler::Sampler(const SamplingSettings& settings, Isa isa)
    : settings_(settings),
      kernels_(sampler_kernels(isa)),
      scan_(kernels_),
      inverse_(1.0f / std::max(settings.temperature, kSmallestTemperature)) {}

void Sampler::observe_prompt(std::span<const int32_t> ids) {
  if (settings_.repetition_penalty == 1.0f) return;
  for (int32_t id : ids) generated_.try_emplace(id, 0);
}

// Uniform in [0, 1) with 53 bits.
double Sampler::uniform(uint64_t round) const {
  return static_cast<double>(mix(mix(settings_.seed + round * 0x9e3779b97f4a7c15u) + drawn_) >> 11) * 0x1p-53;
}

void Sampler::penalise() {
  for (const auto& [id, count] : generated_) {
    if (id < 0 || static_cast<size_t>(id) >= logits_.size()) continue;
    float& logit = logits_[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / settings_.repetition_penalty : logit * settings_.repetition_penalty;
    if (count > 0) {
      logit -= settings_.presence_penalty + settings_.frequency_penalty * static_cast<float>(count);
    }
    scan_.update(id);
  }
}

// Logits as they count: broken ones refused, forbidden ones hidden, penalties applied to a copy.
void Sampler::scan(std::span<const float> logits, std::span<const uint32_t> allowed) {
  scan_.set(logits);
  if (!allowed.empty()) {
    logits_.resize(logits.size());
    kernels_.hide(logits.data(), allowed.data(), static_cast<int64_t>(logits.size()), logits_.data());
    scan_.set_hidden(logits_);
  } else if (!generated_.empty()) {
    logits_.assign(logits.begin(), logits.end());
    scan_.move_to(logits_);
  }
  if (!generated_.empty()) penalise();
  if (!std::isinf(scan_.largest())) return;
  bool any = allowed.empty();
  for (size_t id = 0; id < logits.size() && !any; ++id) any = ((allowed[id / 32] >> (id % 32)) & 1u) != 0;
  throw std::runtime_error(any ? "the largest allowed logit is infinite" : "no token is allowed here");
}

// The top-k candidates, falling.
void Sampler::keep_top_k() {
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const float largest = scan_.largest();
  const float limit =
      std::max(scan_.bound_of_top(settings_.top_k), largest - kNegligible * settings_.temperature);
  const size_t k = static_cast<size_t>(settings_.top_k);
  candidates_.clear();
  size_t at_limit = 0;
  scan_.for_each_from(limit, [&](int32_t id) {
    const float logit = scan_.logits()[static_cast<size_t>(id)];
    if (logit == limit && ++at_limit > k) return;  // k equals of lower ids go before
    candidates_.push_back({(logit - largest) * inverse_, id});
  });
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
    weights_.push_back(std::exp(double{candidate.logit}));
    total += weights_.back();
  }
  size_t kept = 0;
  double sum = 0.0;
  // The token that crosses top_p stays in.
  while (kept < weights_.size() && (kept == 0 || sum < settings_.top_p * total)) sum += weights_[kept++];
  while (kept > 1 && weights_[kept - 1] < settings_.min_p) --kept;  // the largest weight is 1
  weights_.resize(kept);
}

int32_t Sampler::draw_sorted() {
  const double total = std::accumulate(weights_.begin(), weights_.end(), 0.0);
  const double target = uniform(0) * total;
  double sum = 0.0;
  size_t chosen = 0;
  for (; chosen + 1 < weights_.size(); ++chosen) {
    sum += weights_[chosen];
    if (target < sum) break;
  }
  probability_ = weights_[chosen] / total;
  return candidates_[chosen].id;
}

// The token at which the weights of all_ reach the target; a last one that has any weight if rounding hides
// it.
int32_t Sampler::locate(double target) const {
  double sum = 0.0;
  size_t block = 0, last = 0;
  for (; block < sums_.size(); ++block) {
    if (sums_[block] > 0.0f) last = block;
    if (target < sum + double{sums_[block]}) break;
    sum += double{sums_[block]};
  }
  block = last;
  const size_t end = std::min(all_.size(), (block + 1) * size_t{kSampleBlock});
  int32_t chosen = -1;
  for (size_t i = block * size_t{kSampleBlock}; i < end; ++i) {
    if (all_[i] <= 0.0f) continue;
    chosen = static_cast<int32_t>(i);
    sum += double{all_[i]};
    if (target < sum) break;
  }
  return chosen;
}

// Weight of the tokens that precede this one in falling order.
double Sampler::mass_before(int32_t id) const {
  const float w = all_[static_cast<size_t>(id)];
  return kernels_.mass_from(all_.data(), 0, id, w) +
         kernels_.mass_from(all_.data(), id + 1, static_cast<int64_t>(all_.size()), above(w));
}

int32_t Sampler::draw_any() {
  const int64_t n = static_cast<int64_t>(scan_.logits().size());
  all_.resize(static_cast<size_t>(n));
  sums_.resize(static_cast<size_t>((n + kSampleBlock - 1) / kSampleBlock));
  kernels_.weights(scan_.logits().data(), n, scan_.largest(), inverse_, all_.data());
  kernels_.block_sums(all_.data(), n, sums_.data());
  nucleus_ = double{settings_.top_p} * total_of(sums_);
  if (settings_.min_p > 0.0f) {
    kernels_.drop_below(all_.data(), 0, n, settings_.min_p);  // the largest weight is 1
    kernels_.block_sums(all_.data(), n, sums_.data());
  }
  probability_ = -1.0;
  for (uint64_t round = 0;; ++round) {
    const int32_t id = locate(uniform(round) * total_of(sums_));
    if (settings_.top_p >= 1.0f || mass_before(id) < nucleus_) return id;
    // It is outside, and so is all that follows it.
    const float w = all_[static_cast<size_t>(id)];
    kernels_.drop_below(all_.data(), 0, id, w);
    kernels_.drop_below(all_.data(), id, n, above(w));
    kernels_.block_sums(all_.data(), n, sums_.data());
  }
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const uint32_t> allowed) {
  if (logits.empty()) throw std::runtime_error("there are no logits to sample from");
  if (!allowed.empty() && allowed.size() * 32 < logits.size()) {
    throw std::invalid_argument("the mask of allowed tokens is shorter than the vocabulary");
  }
  scan(logits, allowed);
  if (settings_.temperature == 0.0f) {
    last_ = scan_.first_of(scan_.largest());
    probability_ = 1.0;
  } else if (settings_.top_k > 0) {
    keep_top_k();
    keep_probable();
    last_ = draw_sorted();
  } else {
    last_ = draw_any();
  }
  ++drawn_;
  const bool counted = settings_.repetition_penalty != 1.0f || settings_.presence_penalty != 0.0f ||
                       settings_.frequency_penalty != 0.0f;
  if (counted) ++generated_[last_];
  return last_;
}

double Sampler::probability() const {
  if (probability_ >= 0.0) return probability_;
  std::vector<float> falling;
  std::copy_if(all_.begin(), all_.end(), std::back_inserter(falling), [](float w) { return w > 0.0f; });
  std::sort(falling.begin(), falling.end(), std::greater<>());
  double sum = 0.0;
  for (size_t i = 0; i < falling.size() && (i == 0 || sum < nucleus_); ++i) sum += double{falling[i]};
  return double{all_[static_cast<size_t>(last_)]} / sum;
}

}  // namespace flashmoe
