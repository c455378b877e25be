// router: scores of all experts, the chosen top-k, their normalised weights. Spec 4.1.
//
//   s = sqrt(softplus(logit))         binary32
//   score-routed layers: the num_topk largest s + bias (ties: lowest expert id); hash layers: table[token id]
//   weight = s / sum of chosen s * routed_scaling_factor     (without bias; plain s * factor if norm_topk_prob is off)
// Ids come out ascending, so that sums over experts have one order.
// Throws for num_topk outside 1..num_experts; pointers, token ids and the ids in hash_table are not checked, logits may not be NaN.
#pragma once

#include <cstdint>

#include "ops/cpu_context.h"

namespace dsv4 {

struct RouterArgs {
  const float* logits;        // [num_tokens, num_experts]
  const float* bias;          // [num_experts], score-routed layers; nullptr: none
  const int32_t* hash_table;  // [vocab, num_topk] expert ids, hash layers; nullptr: by score
  const int32_t* token_ids;   // [num_tokens], hash layers
  int32_t* topk_idx;          // [num_tokens, num_topk]
  float* topk_weights;        // [num_tokens, num_topk]
  float* margin;  // [num_tokens] score distance between the last chosen and the first refused; nullptr: not wanted
  int64_t num_tokens;
  int num_experts;
  int num_topk;
  float scaling_factor;
  bool normalise;
};

void router(const RouterArgs& args, const CpuContext& context);

}  // namespace dsv4
