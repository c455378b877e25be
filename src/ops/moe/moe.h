// moe: routed experts, clamped SwiGLU, shared expert, weighted sum. One layer, given the routing.
//
// Per routed slot (token, expert e, weight rho), spec 4.2:
//   g = w1 x, u = w3 x                (bf16 outputs outside exact mode)
//   u = clamp(u, -limit, limit); g = min(g, limit); h = rho * (silu(g) * u)   in binary32
//   h -> bf16 (a16) or NVFP4 (a4) or kept (exact); y_e = w2 h   (bf16 output outside exact mode)
// y = sum of y_e in binary32 in order of expert id, plus the shared expert (same formula, rho absent, always a16), rounded
// to bf16 once outside exact mode.
//
// a4: the inputs of w1/w3 and of w2 are quantised to NVFP4 by the run-time rule with one global per row, g = amax(row)/2688
// (1 for a zero row). The GEMM is what FP4 tensor cores compute: per 16-group the integer dot product of the doubled codes is
// exact; times sfx * sfw (exact in binary32); summed over groups in binary32 in the order k = 0, 16, 32, ...; then times
// (global_x * global_w) / 4, that product rounded first. Needs NVFP4 experts. Bytes and sums are the same on every path, and
// so is SwiGLU (swiglu.h): y_e is the same bit for bit everywhere.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/cpu_context.h"
#include "ops/gemm/gemm.h"
#include "ops/gemm/weight.h"
#include "ops/precision.h"

namespace dsv4 {

struct ExpertWeights {
  Weight w1;  // gate [inter, hidden]
  Weight w3;  // up   [inter, hidden]
  Weight w2;  // down [hidden, inter]
};

struct MoeArgs {
  const float* x;                // [num_tokens, hidden]    bf16 values outside exact mode
  const int32_t* topk_idx;       // [num_tokens, num_topk]  expert id, -1 = slot unused; anything else throws
  const float* topk_weights;     // [num_tokens, num_topk]  normalised and scaled by the router
  float* y;                      // [num_tokens, hidden]    must not alias x
  const ExpertWeights* experts;  // [num_experts]
  const ExpertWeights* shared;   // one expert for every token, or nullptr
  int64_t num_tokens;            // 0 is legal
  int64_t hidden;
  int64_t inter;  // of a routed expert; the shared expert's comes from its weights
  int num_experts;
  int num_topk;
  float swiglu_limit;  // positive; infinity: no clamp
  Precision precision;
};

void moe(const MoeArgs& args, const CpuContext& context);

// Bytes: the weights of each activated expert once, activations in and out. Counts the experts topk_idx names.
OpCost moe_cost(const MoeArgs& args);

}  // namespace dsv4
