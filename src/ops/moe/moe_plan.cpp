// MoePlan: the choice of tier and its sizes.
#include "ops/moe/moe_plan.h"

#include <algorithm>

#include "base/check.h"
#include "ops/moe/moe_workspace.h"

namespace dsv4 {
namespace {

// Up to here a layer call is weight streaming with one or two rows per expert; measured in docs/kernels/moe_sm90.md.
constexpr int64_t kStreamMaxTokens = 192;

}  // namespace

MoePlan plan_moe(const MoePlanInput& in) {
  DSV4_CHECK(in.hidden > 0 && in.hidden % 64 == 0 && in.inter > 0 && in.inter % 64 == 0, "hidden = {}, inter = {}: multiples of 64",
             in.hidden, in.inter);
  DSV4_CHECK(in.num_experts > 0 && in.num_experts <= sm90::kMoeMaxExperts, "num_experts = {}, at most {}", in.num_experts,
             sm90::kMoeMaxExperts);
  DSV4_CHECK(in.num_topk > 0 && in.num_topk <= 32, "num_topk = {}, at most 32", in.num_topk);
  DSV4_CHECK(in.num_tokens >= 0 && in.num_tokens * in.num_topk <= (int64_t{1} << 22), "num_tokens = {}", in.num_tokens);
  DSV4_CHECK(in.shared_inter >= 0 && in.shared_inter % 64 == 0, "shared_inter = {}: a multiple of 64", in.shared_inter);
  DSV4_CHECK(in.num_sms > in.reserved_sms && in.reserved_sms >= 0, "{} of {} SMs reserved", in.reserved_sms, in.num_sms);
  MoePlan plan;
  plan.ctas = in.num_sms - in.reserved_sms;
  plan.shared_expert = in.shared_inter > 0;
  const int64_t slots = in.num_tokens * in.num_topk;
  if (in.act == ActFormat::kBf16 && in.num_tokens <= kStreamMaxTokens && slots <= sm90::kStreamMaxSlots) {
    plan.tier = MoeTier::kStream;  // decode: latency and bandwidth
    plan.max_rows = in.num_tokens <= 64 ? 8 : 16;  // beyond, too many experts would need a second pass over their weights
  } else {
    plan.tier = MoeTier::kTiled;  // large decode batches and prefill; every a4 call
    plan.split_launch = in.act == ActFormat::kNvfp4;
  }
  plan.workspace_bytes = layout_moe_workspace(in, plan.tier).bytes;
  return plan;
}

std::string MoePlan::to_string() const {
  const char* shared_text = shared_expert ? ", shared expert before" : "";
  if (tier == MoeTier::kStream) return fmt::format("stream: {} rows a task, {} CTAs, workspace {} bytes{}", max_rows, ctas, workspace_bytes, shared_text);
  return fmt::format("tiled: {} CTAs, {}, workspace {} bytes{}", ctas, split_launch ? "fc1 and fc2 apart" : "fc1 and fc2 in one launch",
                     workspace_bytes, shared_text);
}

}  // namespace dsv4
