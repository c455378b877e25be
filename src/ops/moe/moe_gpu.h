// moe on a Hopper GPU: the contract of moe.h with device pointers and BF16 activations.
//
// Differences from moe.h: x and y are BF16; an expert id out of range is a slot unused, since nothing here looks at ids on the host; the
// shared expert is FP8 (or its output is an input); exact mode does not exist here. Weights: find_moe_sides and pack_moe_expert
// (moe_pack_sm90.h), pack_moe_shared (moe_shared_sm90.h). moe_gpu does not synchronise with the host and can be captured in a
// graph. Same inputs give the same bits. In a4 sums run in the order of the tensor core, not of the contract.
//
// The shared expert given as weights runs inside the one launch of the ring and the streaming tier, and in two launches before
// the routed experts in the tiled tier (MoePlan::shared). Its inter need not be the routed experts'.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/moe/moe_plan.h"
#include "ops/moe/moe_shared_sm90.h"
#include "ops/moe/moe_sm90.h"

namespace dsv4 {

struct MoeGpuArgs {
  sm90::MoeExperts experts;
  sm90::MoeShape shape;
  const bf16* x;                  // [num_tokens, hidden]
  const int32_t* topk_idx;        // [num_tokens, num_topk]  expert id; negative or >= num_experts: slot unused
  const float* topk_weights;      // [num_tokens, num_topk]
  sm90::MoeSharedWeights shared;  // the shared expert, or none
  const bf16*
      shared_y;        // [num_tokens, hidden] its output, where that is computed elsewhere (shared is none), or nullptr
  bf16* y;             // [num_tokens, hidden]    must not alias x
  int64_t num_tokens;  // 0 is legal
  float swiglu_limit;
  ActFormat act;
  void* workspace;  // at least plan.workspace_bytes, 256-byte aligned
  int64_t workspace_bytes;
};

// Once after allocating a workspace, waits for the stream; calls leave it ready for the next, of any plan with the same hidden. Its first
// MoeWorkspace::counter_bytes are theirs alone: the ring tier adds to one of these counters before it waits for the kernel before it
// (gpu/launch.h), which must let its dependents start only after its own wait, as all of this library do.
void init_moe_workspace(void* workspace, const MoePlanInput& input, cudaStream_t stream);

void moe_gpu(const MoeGpuArgs& args, const MoePlan& plan, cudaStream_t stream);

}  // namespace dsv4
