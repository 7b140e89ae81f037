#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>

#include "flashmoe/sampler.h"

namespace flashmoe {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

}  // namespace

void LogitScan::set(std::span<const float> logits) {
  logits_ = logits;
  const size_t block = static_cast<size_t>(kSampleBlock);
  maxima_.resize((logits.size() + block - 1) / block);
  if (kernels_.block_maxima(logits.data(), static_cast<int64_t>(logits.size()), maxima_.data())) return;
  if (std::any_of(logits.begin(), logits.end(), [](float x) { return std::isnan(x); })) {
    throw std::runtime_error("a logit is not a number");
  }
}

void LogitScan::set_hidden(std::span<const float> logits) {
  logits_ = logits;
  kernels_.block_maxima(logits.data(), static_cast<int64_t>(logits.size()), maxima_.data());
}

void LogitScan::update(int32_t id) {
  const size_t b = static_cast<size_t>(id) / size_t{kSampleBlock}, first = b * size_t{kSampleBlock};
  const size_t n = std::min(logits_.size() - first, size_t{kSampleBlock});
  kernels_.block_maxima(logits_.data() + first, static_cast<int64_t>(n), &maxima_[b]);
}

float LogitScan::largest() const { return *std::max_element(maxima_.begin(), maxima_.end()); }

int32_t LogitScan::first_of(float value) const {
  const auto block = std::find(maxima_.begin(), maxima_.end(), value);
  const auto first = logits_.begin() + (block - maxima_.begin()) * kSampleBlock;
  return static_cast<int32_t>(std::find(first, logits_.end(), value) - logits_.begin());
}

float LogitScan::bound_of_top(int64_t k) {
  if (k > static_cast<int64_t>(maxima_.size())) return kNever;
  selection_ = maxima_;
  const auto kth = selection_.begin() + (k - 1);
  std::nth_element(selection_.begin(), kth, selection_.end(), std::greater<>());
  return *kth;
}

TopLogprobs top_logprobs(std::span<const float> logits, int64_t count, Isa isa) {
  if (logits.empty()) throw std::runtime_error("there are no logits");
  const SamplerKernels& kernels = sampler_kernels(isa);
  LogitScan scan(kernels);
  scan.set(logits);
  const float largest = scan.largest();
  if (std::isinf(largest)) throw std::runtime_error("the largest logit is infinite");
  const int64_t n = static_cast<int64_t>(logits.size());
  std::vector<float> weights(logits.size());
  kernels.weights(logits.data(), n, largest, 1.0f, weights.data());
  TopLogprobs result;
  result.log_sum = double{largest} + std::log(kernels.mass_from(weights.data(), 0, n, 0.0f));
  count = std::min(count, n);
  if (count < 1) return result;
  scan.for_each_from(scan.bound_of_top(count),
                     [&](int32_t id) { result.best.emplace_back(id, logits[static_cast<size_t>(id)]); });
  const auto before = [](const auto& a, const auto& b) {
    return a.second != b.second ? a.second > b.second : a.first < b.first;
  };
  std::partial_sort(result.best.begin(), result.best.begin() + count, result.best.end(), before);
  result.best.resize(static_cast<size_t>(count));
  return result;
}

}  // namespace flashmoe
