// Sampling on the CPU.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "ops/sampling/sampling.h"

namespace dsv4 {

uint64_t SamplingRng::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

int32_t argmax(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

int32_t sample(std::span<const float> logits, const SamplingParams& params, SamplingRng& rng) {
  DSV4_CHECK(!logits.empty(), "no logits");
  if (params.temperature <= 0.0f || params.top_k == 1) return argmax(logits);

  static thread_local std::vector<int32_t> order;
  static thread_local std::vector<double> probability;
  order.resize(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  size_t kept = logits.size();
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < kept) {
    kept = static_cast<size_t>(params.top_k);
    std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(kept), order.end(), before);
  } else {
    std::sort(order.begin(), order.end(), before);
  }

  const double best = logits[order[0]];
  probability.resize(kept);
  double sum = 0;
  for (size_t i = 0; i < kept; ++i) sum += probability[i] = std::exp((logits[order[i]] - best) / params.temperature);
  for (size_t i = 1; i < kept; ++i)
    if (probability[i] < params.min_p * probability[0]) kept = i;
  double mass = 0;
  for (size_t i = 0; i < kept; ++i) {
    mass += probability[i];
    if (mass >= params.top_p * sum) kept = i + 1;
  }

  const double target = rng.uniform() * mass;
  double reached = 0;
  for (size_t i = 0; i < kept; ++i) {
    reached += probability[i];
    if (reached > target) return order[i];
  }
  return order[kept - 1];
}

}  // namespace dsv4
