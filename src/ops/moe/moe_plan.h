// Which kernels one MoE layer call runs on a Hopper GPU, decided on the host from the shape alone (routing is on the device).
#pragma once

#include <cstdint>
#include <string>

#include "ops/precision.h"

namespace dsv4 {

enum class MoeTier : uint8_t {
  kStream,  // one launch, weights streamed past at most 8 or 16 token rows (moe_stream_sm90.cuh)
  kTiled,   // route, gather, GEMMs, combine; up to 128 token rows a tile (moe_tiled_sm90.cuh)
};

struct MoePlanInput {
  int64_t num_tokens = 0;
  int64_t hidden = 0, inter = 0;  // multiples of 64
  int num_experts = 0, num_topk = 0;
  ActFormat act = ActFormat::kBf16;
  int num_sms = 132;
  int reserved_sms = 0;  // left to a kernel that runs beside this one
  int64_t shared_inter = 0;  // of the shared expert, if its weights are given: a multiple of 64
};

struct MoePlan {
  MoeTier tier = MoeTier::kStream;
  int max_rows = 0;      // kStream: token rows a task
  int ctas = 0;          // persistent, one per SM
  bool split_launch = false;  // fc1 and fc2 in launches of their own (a4: the global scale of a row of h needs the whole row)
  bool shared_expert = false;  // its two GEMMs run before the routed experts (moe_shared_sm90.h)
  int64_t workspace_bytes = 0;

  std::string to_string() const;
};

// Throws Error(kInternal) for a shape the kernels cannot run.
MoePlan plan_moe(const MoePlanInput& input);

}  // namespace dsv4
