// Choosing the next token from logits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flashmoe/sampler_kernels.h"

namespace flashmoe {

struct SamplingSettings {
  float temperature = 1.0f;  // 0: the largest logit
  int64_t top_k = 0;         // 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  float presence_penalty = 0.0f;   // subtracted once from tokens generated before
  float frequency_penalty = 0.0f;  // subtracted for each time a token was generated
  float repetition_penalty =
      1.0f;  // divides positive, multiplies negative logits of prompt and generated tokens
  uint64_t seed = 0;
};

// A vocabulary of logits and the largest of each block of 64, which answer most questions about it without
// another pass.  Points to the logits; not thread-safe.
class LogitScan {
 public:
  explicit LogitScan(const SamplerKernels& kernels) : kernels_(kernels) {}

  // Throws std::runtime_error when a logit is not a number.
  void set(std::span<const float> logits);
  // Logits made from those of set() by hiding some of them.
  void set_hidden(std::span<const float> logits);
  // A copy of the same logits.
  void move_to(std::span<const float> logits) { logits_ = logits; }
  // Looks again at the block of a logit that has been changed.
  void update(int32_t id);

  std::span<const float> logits() const { return logits_; }
  float largest() const;
  // Lowest id of that value.
  int32_t first_of(float value) const;
  // At least k logits are as large as this (0 < k); -infinity when that takes more than the maxima.
  float bound_of_top(int64_t k);
  // Calls take(id) for every logit >= limit, ids ascending.
  template <class Take>
  void for_each_from(float limit, Take&& take) const {
    for (size_t b = 0; b < maxima_.size(); ++b) {
      if (!(maxima_[b] >= limit)) continue;
      const size_t end = std::min(logits_.size(), (b + 1) * size_t{kSampleBlock});
      for (size_t i = b * size_t{kSampleBlock}; i < end; ++i) {
        if (logits_[i] >= limit) take(static_cast<int32_t>(i));
      }
    }
  }

 private:
  const SamplerKernels& kernels_;
  std::span<const float> logits_;
  std::vector<float> maxima_;
  std::vector<float> selection_;
};

// Penalties, temperature, top-k, top-p, min-p, then one draw, in this order (as Hugging Face does).
//
// The draw is a function of (seed, number of tokens sampled before) alone.  Among equal logits the lower id
// comes first.  With top-k the few candidates are sorted and drawn from in that order.  Without it nothing is
// sorted: a token is drawn from all in the order of ids, and kept if what precedes it in probability is below
// top-p; if not, it and all behind it are dropped and the draw is repeated, which gives the same distribution
// (the pivots of FlashInfer's sampler, arXiv 2501.01005).  Not thread-safe.
class Sampler {
 public:
  Sampler(const SamplingSettings& settings, Isa isa);

  // Tokens of the prompt: they count for the repetition penalty.
  void observe_prompt(std::span<const int32_t> ids);

  // The next token, which is then counted as generated.  `allowed`: one bit a token, empty for all.
  // Throws std::runtime_error when a logit is not a number, no token is allowed or the largest allowed logit
  // is infinite; std::invalid_argument when the mask is shorter than the vocabulary.
  int32_t sample(std::span<const float> logits, std::span<const uint32_t> allowed);

  // Probability that the last sampled token had after all filters; takes a sort when nothing was sorted.
  double probability() const;

 private:
  struct Candidate {
    float logit;  // minus the largest, divided by the temperature
    int32_t id;
  };

  void scan(std::span<const float> logits, std::span<const uint32_t> allowed);
  void penalise();
  void keep_top_k();
  void keep_probable();
  int32_t draw_sorted();
  int32_t draw_any();
  int32_t locate(double target) const;
  double mass_before(int32_t id) const;
  double uniform(uint64_t round) const;

  SamplingSettings settings_;
  const SamplerKernels& kernels_;
  LogitScan scan_;
  float inverse_;                                   // of the temperature
  std::unordered_map<int32_t, int32_t> generated_;  // times generated; 0 for tokens of the prompt only
  uint64_t drawn_ = 0;
  std::vector<float> logits_;  // a copy, where a mask or penalties change them
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;  // of the candidates
  // Of all tokens, when nothing is sorted.
  std::vector<float> all_, sums_;
  double nucleus_ = 0.0;  // weight that top-p lets through
  int32_t last_ = 0;
  double probability_ = 1.0;  // negative: not known yet
};

struct TopLogprobs {
  double log_sum = 0.0;                         // log of the sum of e^logit
  std::vector<std::pair<int32_t, float>> best;  // ids and logits, falling; equal ones by rising id
};

// The `count` most likely tokens and what turns logits into log-probabilities (subtract log_sum).
// Throws std::runtime_error when a logit is not a number or the largest is infinite.
TopLogprobs top_logprobs(std::span<const float> logits, int64_t count, Isa isa);

}  // namespace flashmoe
