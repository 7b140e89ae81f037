// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

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

// Penalties, temperature, top-k, top-p, min-p, then one draw, in this order (as Hugging Face does).
//
// The draw is a function of (seed, number of tokens sampled before) alone.  Candidates are ordered by falling
// probability, equal ones by rising id, so that the result does not depend on how they were selected.
// Not thread-safe.
class Sampler {
 public:
  explicit Sampler(const SamplingSettings& settings) : settings_(settings) {}

  // Tokens of the prompt: they count for the repetition penalty.
  void observe_prompt(std::span<const int32_t> ids);

  // The next token, which is then counted as generated.  `allowed`: one bit a token, empty for all.
  // Throws std::runtime_error when a logit is not a number, no token is allowed or the largest allowed logit
  // is infinite; std::invalid_argument when the mask is shorter than the vocabulary.
  int32_t sample(std::span<const float> logits, std::span<const uint32_t> allowed);

  // Probability that the last sampled token had after all filters.
  double probability() const { return probability_; }

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };

  void penalise(std::span<float> logits) const;
  void gather(std::span<const float> logits, std::span<const uint32_t> allowed);
  void keep_top_k();
  void keep_probable();
  int32_t draw();

  SamplingSettings settings_;
  std::unordered_map<int32_t, int32_t> generated_;  // times generated; 0 for tokens of the prompt only
  uint64_t drawn_ = 0;
  double probability_ = 1.0;
  std::vector<float> logits_;
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;
};

}  // namespace flashmoe
