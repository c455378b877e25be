// sampling: one token id from logits. Greedy at temperature 0 (ties: lowest id); otherwise temperature, then top-k, top-p and
// min-p on the probabilities, then one draw. Same seed, same draws, on every platform.
// sample throws for an empty span, argmax of one is 0; logits are not checked: none may be NaN and one must be finite.
#pragma once

#include <cstdint>
#include <span>

namespace dsv4 {

struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy
  int top_k = 0;             // 0: all
  float top_p = 1.0f;        // smallest set whose probability reaches top_p
  float min_p = 0.0f;        // drop tokens below min_p * p(best)
};

// splitmix64: 64 bits of state, passes BigCrush, and its output is fixed by definition (std distributions are not).
class SamplingRng {
 public:
  explicit SamplingRng(uint64_t seed) : state_(seed) {}
  uint64_t next();
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)

 private:
  uint64_t state_;
};

int32_t argmax(std::span<const float> logits);
int32_t sample(std::span<const float> logits, const SamplingParams& params, SamplingRng& rng);

}  // namespace dsv4
