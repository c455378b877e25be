// Router on the CPU.
#include "ops/router/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/check.h"

namespace dsv4 {
namespace {

// torch's softplus: identity above 20.
float sqrt_softplus(float z) { return std::sqrt(z > 20.0f ? z : std::log1p(std::exp(z))); }

// Ids of the k largest keys, ties to the lowest id, ascending by id. Returns the margin to the next key.
float choose_topk(const std::vector<float>& keys, int k, int32_t* out) {
  thread_local std::vector<int32_t> order;
  order.resize(keys.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  const auto before = [&](int32_t a, int32_t b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); };
  const size_t sorted = std::min(keys.size(), static_cast<size_t>(k) + 1);
  std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(sorted), order.end(), before);
  const float margin =
      sorted > static_cast<size_t>(k) ? keys[order[k - 1]] - keys[order[k]] : std::numeric_limits<float>::infinity();
  std::copy_n(order.begin(), k, out);
  std::sort(out, out + k);
  return margin;
}

}  // namespace

void router(const RouterArgs& args, const CpuContext& context) {
  DSV4_CHECK(args.num_topk >= 1 && args.num_topk <= args.num_experts, "num_topk = {}, num_experts = {}", args.num_topk,
             args.num_experts);
  for_rows(context, args.num_tokens, args.num_experts * 32, [&](int64_t token) {
    thread_local std::vector<float> scores, keys;
    scores.resize(args.num_experts);
    const float* logits = args.logits + token * args.num_experts;
    for (int e = 0; e < args.num_experts; ++e) scores[e] = sqrt_softplus(logits[e]);

    int32_t* idx = args.topk_idx + token * args.num_topk;
    float margin = std::numeric_limits<float>::infinity();
    if (args.hash_table != nullptr) {
      std::copy_n(args.hash_table + static_cast<int64_t>(args.token_ids[token]) * args.num_topk, args.num_topk, idx);
      std::sort(idx, idx + args.num_topk);
    } else {
      keys = scores;
      if (args.bias != nullptr)
        for (int e = 0; e < args.num_experts; ++e) keys[e] += args.bias[e];
      margin = choose_topk(keys, args.num_topk, idx);
    }
    if (args.margin != nullptr) args.margin[token] = margin;

    float* weights = args.topk_weights + token * args.num_topk;
    float sum = 0;
    for (int j = 0; j < args.num_topk; ++j) sum += weights[j] = scores[idx[j]];
    const float factor = args.normalise ? args.scaling_factor / std::max(sum, 1e-20f) : args.scaling_factor;
    for (int j = 0; j < args.num_topk; ++j) weights[j] *= factor;
  });
}

}  // namespace dsv4
