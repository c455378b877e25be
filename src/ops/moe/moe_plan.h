// Which kernels one MoE layer call runs on a Hopper GPU, decided on the host from the shape alone (routing is on the device).
#pragma once

#include <cstdint>
#include <string>

#include "ops/moe/moe_sm90.h"
#include "ops/precision.h"

namespace dsv4 {

enum class MoeTier : uint8_t {
  kRing,  // one launch, tasks of 64 weight rows x 8 token rows, K split over warps: one to three tokens (moe_ring_sm90.cuh)
  kStream,  // one launch, tasks of 256 weight rows x up to 32 token rows: decode batches (moe_stream_sm90.cuh)
  kTiled,  // route, gather, GEMMs, combine; up to 120 token rows a tile: prefill, and every a4 call (moe_tiled_sm90.cuh)
};

// Where the FP8 shared expert is computed.
enum class MoeSharedPlace : uint8_t {
  kNone,
  kInLaunch,  // ring and streaming tier: tasks of the one launch
  kBefore,    // tiled tier: two launches before the routed experts (moe_shared_sm90.h), whose latency is little there
};
constexpr MoeSharedPlace moe_shared_place(MoeTier tier, int64_t shared_inter) {
  return shared_inter == 0         ? MoeSharedPlace::kNone
         : tier == MoeTier::kTiled ? MoeSharedPlace::kBefore
                                   : MoeSharedPlace::kInLaunch;
}

struct MoePlanInput {
  int64_t num_tokens = 0;
  int64_t hidden = 0, inter = 0;  // multiples of 64
  int num_experts = 0, num_topk = 0;
  ActFormat act = ActFormat::kBf16;
  int num_sms = 132;
  int reserved_sms = 0;      // left to a kernel that runs beside this one
  int64_t shared_inter = 0;  // of the shared expert, if its weights are given: a multiple of 64
};

struct MoePlan {
  MoeTier tier = MoeTier::kStream;
  const char* workload = "";  // what the choice was made for
  int ctas = 0;               // persistent, one per SM
  bool split_launch =
      false;  // fc1 and fc2 in launches of their own (a4: the global scale of a row of h needs the whole row)
  MoeSharedPlace shared = MoeSharedPlace::kNone;  // follows from the tier
  int64_t workspace_bytes = 0;

  std::string to_string() const;
};

// Most slots (num_tokens * num_topk) that a tier can run.
constexpr int64_t moe_tier_max_slots(MoeTier tier) {
  return tier == MoeTier::kRing     ? sm90::kRingMaxSlots
         : tier == MoeTier::kStream ? sm90::kStreamMaxSlots
                                    : int64_t{1} << 22;
}

// Throws Error(kInternal) for a shape the kernels cannot run.
MoePlan plan_moe(const MoePlanInput& input);

}  // namespace dsv4
