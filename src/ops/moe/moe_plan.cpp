// MoePlan: the choice of tier and its sizes.
#include "ops/moe/moe_plan.h"

#include <algorithm>

#include "base/check.h"
#include "ops/moe/moe_workspace.h"

namespace dsv4 {
namespace {

// Crossovers, measured in docs/kernels/moe_sm90.md.
constexpr double kStreamMinTasksPerCta = 2.5;  // fewer fc1 tasks: the streaming tier leaves CTAs without work
// More rows an expert on average: decoding and LDS per token row cost the streaming tier more than tiles do. With a shared expert, which the
// streaming tier has in its launch and the tiled one before it, later.
constexpr int64_t stream_max_rows_per_expert(bool shared) { return shared ? 7 : 4; }

}  // namespace

MoePlan plan_moe(const MoePlanInput& in) {
  DSV4_CHECK(in.hidden > 0 && in.hidden % 64 == 0 && in.inter > 0 && in.inter % 64 == 0,
             "hidden = {}, inter = {}: multiples of 64", in.hidden, in.inter);
  DSV4_CHECK(in.num_experts > 0 && in.num_experts <= sm90::kMoeMaxExperts, "num_experts = {}, at most {}",
             in.num_experts, sm90::kMoeMaxExperts);
  DSV4_CHECK(in.num_topk > 0 && in.num_topk <= 32, "num_topk = {}, at most 32", in.num_topk);
  DSV4_CHECK(in.num_tokens >= 0 && in.num_tokens * in.num_topk <= (int64_t{1} << 22), "num_tokens = {}", in.num_tokens);
  DSV4_CHECK(in.shared_inter >= 0 && in.shared_inter % 64 == 0, "shared_inter = {}: a multiple of 64", in.shared_inter);
  DSV4_CHECK(in.num_sms > in.reserved_sms && in.reserved_sms >= 0, "{} of {} SMs reserved", in.reserved_sms,
             in.num_sms);
  MoePlan plan;
  plan.ctas = in.num_sms - in.reserved_sms;
  const int64_t slots = in.num_tokens * in.num_topk;
  const int64_t fc1_tasks = slots * ((moe_fc1_strips(in.inter) + 3) / 4);  // if no two tokens share an expert
  if (in.act != ActFormat::kBf16 || slots > in.num_experts * stream_max_rows_per_expert(in.shared_inter > 0) ||
      slots > sm90::kStreamMaxSlots || std::max(in.hidden, in.inter) > sm90::kStreamMaxColumns) {
    plan.tier = MoeTier::kTiled;
    plan.workload = in.act != ActFormat::kBf16 ? "a4, any number of tokens"
                                               : "prefill and large decode batches: decoding once per tile pays";
    plan.split_launch = in.act == ActFormat::kNvfp4;
  } else if (static_cast<double>(fc1_tasks) < kStreamMinTasksPerCta * plan.ctas && slots <= sm90::kRingMaxSlots) {
    plan.tier = MoeTier::kRing;
    plan.workload = "one to three tokens: latency";
  } else {
    plan.tier = MoeTier::kStream;
    plan.workload = "decode batches: bandwidth";
  }
  plan.shared = moe_shared_place(plan.tier, in.shared_inter);
  plan.workspace_bytes = layout_moe_workspace(in, plan.tier).bytes;
  return plan;
}

std::string MoePlan::to_string() const {
  const char* name = tier == MoeTier::kRing ? "ring" : tier == MoeTier::kStream ? "stream" : "tiled";
  return fmt::format("{} ({}): {} CTAs, {}{}, workspace {} bytes", name, workload, ctas,
                     split_launch ? "fc1 and fc2 apart" : "fc1 and fc2 in one launch",
                     shared == MoeSharedPlace::kInLaunch ? ", shared expert in the launch"
                     : shared == MoeSharedPlace::kBefore ? ", shared expert before"
                                                         : "",
                     workspace_bytes);
}

}  // namespace dsv4
