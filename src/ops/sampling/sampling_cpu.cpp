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

namespace {

// Candidates in order of probability, sorted only as far as asked: most draws need the first few of 129,280.
class RankedTokens {
 public:
  explicit RankedTokens(std::span<const float> logits) : logits_(logits), order_(logits.size()) {
    std::iota(order_.begin(), order_.end(), 0);
  }
  int32_t operator[](size_t rank) {
    if (rank >= sorted_) sort_up_to(std::min(order_.size(), std::max<size_t>(64, 4 * rank)));
    return order_[rank];
  }

 private:
  void sort_up_to(size_t count) {
    std::partial_sort(
        order_.begin() + static_cast<int64_t>(sorted_), order_.begin() + static_cast<int64_t>(count), order_.end(),
        [&](int32_t a, int32_t b) { return logits_[a] > logits_[b] || (logits_[a] == logits_[b] && a < b); });
    sorted_ = count;
  }
  std::span<const float> logits_;
  std::vector<int32_t> order_;
  size_t sorted_ = 0;
};

}  // namespace

int32_t sample(std::span<const float> logits, const SamplingParams& params, SamplingRng& rng) {
  DSV4_CHECK(!logits.empty(), "no logits");
  const int32_t best = argmax(logits);
  if (params.temperature <= 0.0f || params.top_k == 1) return best;
  const auto weight = [&](int32_t id) {
    return std::exp((static_cast<double>(logits[id]) - logits[best]) / params.temperature);
  };

  // Kept: the most likely tokens until top_k of them, top_p of the mass (among the top_k), or min_p cut the list.
  const size_t limit = params.top_k > 0 ? std::min(logits.size(), static_cast<size_t>(params.top_k)) : logits.size();
  RankedTokens ranked(logits);
  double total = 0;
  if (limit == logits.size()) {
    for (size_t id = 0; id < logits.size(); ++id) total += weight(static_cast<int32_t>(id));
  } else {
    for (size_t rank = 0; rank < limit; ++rank) total += weight(ranked[rank]);
  }
  std::vector<double> kept;
  double mass = 0;
  while (kept.size() < limit && (kept.empty() || mass < params.top_p * total)) {
    const double next = weight(ranked[kept.size()]);
    if (!kept.empty() && next < params.min_p) break;
    kept.push_back(next);
    mass += next;
  }

  const double target = rng.uniform() * mass;
  double reached = 0;
  for (size_t rank = 0; rank < kept.size(); ++rank) {
    reached += kept[rank];
    if (reached > target) return ranked[rank];
  }
  return ranked[kept.size() - 1];
}

}  // namespace dsv4
