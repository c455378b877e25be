// Checks, workspace pointers, and the launches of a plan.
#include "ops/moe/moe_gpu.h"

#include "gpu/check.h"
#include "ops/moe/moe_workspace.h"

namespace dsv4 {
namespace {

template <class T>
T* at(const MoeGpuArgs& args, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(args.workspace) + offset);
}

void run_in_one_launch(const MoeGpuArgs& args, const MoePlan& plan, const MoeWorkspace& layout, cudaStream_t stream) {
  sm90::MoeStreamArgs s{};
  s.experts = args.experts;
  s.shape = args.shape;
  s.x = args.x;
  s.topk_idx = args.topk_idx;
  s.topk_weights = args.topk_weights;
  if (plan.shared == MoeSharedPlace::kInLaunch) {
    s.shared = args.shared;
    s.shared_h = at<bf16>(args, layout.shared_h);
    s.shared_y = at<bf16>(args, layout.shared_y);
  } else {
    s.shared_y = const_cast<bf16*>(args.shared_y);  // only read
  }
  s.y = args.y;
  s.h = at<bf16>(args, layout.h);
  s.slot_y = at<bf16>(args, layout.slot_y);
  s.fc1_done = at<uint32_t>(args, layout.fc1_done);
  s.fc2_done = at<uint32_t>(args, layout.fc2_done);
  s.exited = at<uint32_t>(args, layout.exited);
  s.drawn = at<uint32_t>(args, layout.drawn);
  s.ticket = at<uint32_t>(args, layout.ticket_stream);
  s.num_tokens = static_cast<int>(args.num_tokens);
  s.swiglu_limit = args.swiglu_limit;
  if (plan.tier == MoeTier::kRing)
    sm90::launch_moe_ring(s, plan.ctas, stream);
  else
    sm90::launch_moe_stream(s, plan.ctas, stream);
}

void run_tiled(const MoeGpuArgs& args, const MoePlan& plan, const MoeWorkspace& layout, cudaStream_t stream) {
  sm90::MoeRouting routing{};
  routing.tiles = at<sm90::MoeTile>(args, layout.tiles);
  routing.num_tiles = at<int32_t>(args, layout.num_tiles);
  routing.expert_rows = at<int32_t>(args, layout.expert_rows);
  routing.row_slot = at<int32_t>(args, layout.row_slot);
  routing.slot_row = at<int32_t>(args, layout.slot_row);
  routing.ticket = at<uint32_t>(args, layout.ticket);
  routing.tile_done = at<uint32_t>(args, layout.tile_done);
  routing.max_tiles =
      static_cast<int>(sm90::moe_max_tiles(args.num_tokens * args.shape.num_topk, args.shape.num_experts));
  sm90::MoeTiledArgs t{};
  t.experts = args.experts;
  t.shape = args.shape;
  t.routing = routing;
  t.topk_weights = args.topk_weights;
  t.x_rows = at<bf16>(args, layout.x_rows);
  t.h_rows = at<bf16>(args, layout.h);
  t.slot_y = at<bf16>(args, layout.slot_y);
  t.swiglu_limit = args.swiglu_limit;
  sm90::launch_moe_route(args.shape, args.topk_idx, args.num_tokens, routing, stream);
  if (args.act == ActFormat::kNvfp4) {
    float* x_global = at<float>(args, layout.x_global);
    float* h_global = at<float>(args, layout.h_global);
    t.x_global = x_global;
    t.h_global = h_global;
    t.h_wide = at<float>(args, layout.h_wide);
    sm90::launch_moe_gather_nvfp4(args.shape, routing, args.topk_idx, args.x, args.num_tokens,
                                  at<bf16>(args, layout.x_rows), x_global, stream);
    sm90::launch_moe_tiled(t, sm90::TiledPhase::kFc1, plan.ctas, stream);
    sm90::launch_moe_requantize(args.shape, routing, t.h_wide, t.h_rows, h_global, stream);
    sm90::launch_moe_tiled(t, sm90::TiledPhase::kFc2, plan.ctas, stream);
  } else {
    sm90::launch_moe_gather(args.shape, routing, args.topk_idx, args.x, args.num_tokens, at<bf16>(args, layout.x_rows),
                            stream);
    sm90::launch_moe_tiled(t, sm90::TiledPhase::kBoth, plan.ctas, stream);
  }
  sm90::launch_moe_combine(args.shape, args.topk_idx, t.slot_y, args.shared_y, args.num_tokens, args.y, stream);
}

}  // namespace

void init_moe_workspace(void* workspace, const MoePlanInput& input, cudaStream_t stream) {
  DSV4_CUDA(cudaMemsetAsync(workspace, 0,
                            static_cast<size_t>(layout_moe_workspace(input, MoeTier::kStream).counter_bytes), stream));
  DSV4_CUDA(cudaStreamSynchronize(stream));
}

void moe_gpu(const MoeGpuArgs& args, const MoePlan& plan, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  MoePlanInput input;
  input.num_tokens = args.num_tokens;
  input.hidden = args.shape.hidden;
  input.inter = args.shape.inter;
  input.num_experts = args.shape.num_experts;
  input.num_topk = args.shape.num_topk;
  input.act = args.act;
  input.shared_inter = args.shared.fc1 ? args.shared.inter : 0;
  const MoeWorkspace layout = layout_moe_workspace(input, plan.tier);
  DSV4_GPU_REQUIRE("moe", args.workspace_bytes >= layout.bytes, "workspace of %lld bytes, %lld needed for %lld tokens",
                   static_cast<long long>(args.workspace_bytes), static_cast<long long>(layout.bytes),
                   static_cast<long long>(args.num_tokens));
  DSV4_GPU_REQUIRE("moe", plan.tier == MoeTier::kTiled || args.act == ActFormat::kBf16,
                   "a4 runs in the tiled tier only (%d)", static_cast<int>(args.act));
  DSV4_GPU_REQUIRE("moe", args.num_tokens * args.shape.num_topk <= moe_tier_max_slots(plan.tier),
                   "num_tokens * num_topk = %lld, expected at most %lld in the plan's tier (%s)",
                   static_cast<long long>(args.num_tokens * args.shape.num_topk),
                   static_cast<long long>(moe_tier_max_slots(plan.tier)), plan.workload);
  DSV4_GPU_REQUIRE("moe",
                   plan.tier != MoeTier::kStream ||
                       (args.shape.hidden <= sm90::kStreamMaxColumns && args.shape.inter <= sm90::kStreamMaxColumns),
                   "hidden = %d, inter = %d, expected at most %d in the streaming tier", args.shape.hidden,
                   args.shape.inter, sm90::kStreamMaxColumns);
  DSV4_GPU_REQUIRE("moe",
                   (reinterpret_cast<uintptr_t>(args.experts.fc1) | reinterpret_cast<uintptr_t>(args.experts.fc2)) %
                           kMoeChunkPairBytes ==
                       0,
                   "fc1 at %p, fc2 at %p, expected multiples of %lld", static_cast<const void*>(args.experts.fc1),
                   static_cast<const void*>(args.experts.fc2), static_cast<long long>(kMoeChunkPairBytes));
  DSV4_GPU_REQUIRE("moe", !args.shared.fc1 || !args.shared_y,
                   "expected the shared expert as weights (inter = %d) or as shared_y, found both", args.shared.inter);
  DSV4_GPU_REQUIRE("moe", !args.shared.fc1 || (args.shared.inter > 0 && args.shared.inter % 64 == 0),
                   "inter of the shared expert = %d, expected a multiple of 64", args.shared.inter);
  DSV4_GPU_REQUIRE("moe", (plan.shared != MoeSharedPlace::kNone) == (args.shared.fc1 != nullptr),
                   "plan for a shared expert: %d, found weights of one: %d", plan.shared != MoeSharedPlace::kNone,
                   args.shared.fc1 != nullptr);
  DSV4_GPU_REQUIRE("moe", plan.tier != MoeTier::kTiled || plan.shared != MoeSharedPlace::kInLaunch,
                   "the tiled tier (%s) has no shared expert in its launch: plan it before", plan.workload);
  MoeGpuArgs routed = args;
  if (plan.shared == MoeSharedPlace::kBefore) {
    bf16* shared_y = at<bf16>(args, layout.shared_y);
    sm90::launch_moe_shared({args.shared, args.x, at<bf16>(args, layout.shared_h), shared_y, args.num_tokens,
                             args.shape.hidden, args.swiglu_limit},
                            stream);
    routed.shared_y = shared_y;
  }
  if (plan.tier == MoeTier::kTiled)
    run_tiled(routed, plan, layout, stream);
  else
    run_in_one_launch(routed, plan, layout, stream);
}

}  // namespace dsv4
