// The fixture of the MoE tests: Hopper or skipped; one call checked element by element against its bounds.
#pragma once

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "gpu/device.h"
#include "gpu/moe_reference.cuh"

namespace dsv4::testing {

class MoeGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    const gpu::DeviceList list = gpu::find_devices();
    if (list.devices.empty()) GTEST_SKIP() << "no GPU: " << list.absence;
    cudaDeviceProp device{};
    DSV4_CUDA(cudaGetDeviceProperties(&device, 0));
    if (device.major != 9) GTEST_SKIP() << "needs Hopper, found " << device.name;
    num_sms = device.multiProcessorCount;
  }

  // Random experts: every finite scale incl. 0 and subnormals, three different globals per expert.
  void use(const CaseShape& shape, ScaleRange range = ScaleRange::kAll, SideSource sides = SideSource::kFound) {
    experts = make_experts(shape, 10, range, stream().get(), sides);
    ASSERT_EQ(experts.wrong_weights, 0u) << "weights that decode to another value";
  }
  void use_shared(int inter) {
    experts.shared = make_shared_expert(experts.shape.hidden, inter, 40, stream().get());
    ASSERT_EQ(experts.shared.wrong_weights, 0u) << "shared weights that decode to another value";
  }
  Reference reference_of(const Layer& l, ActFormat act, bool shared, std::vector<int32_t> sample = {}) {
    const Fp8Weights weights = Fp8Weights::of(experts.shared);
    return make_reference(experts.linear(), l, act, stream().get(), std::move(sample), shared ? &weights : nullptr);
  }
  Layer layer(std::vector<int32_t> idx, bool shared_y, uint64_t seed = 7) {
    const int64_t tokens = static_cast<int64_t>(idx.size()) / experts.shape.topk;
    return make_layer(experts.shape, std::move(idx), tokens, seed, shared_y, stream().get());
  }
  Layer layer(int64_t tokens, Routing routing, bool shared_y) {
    return make_layer(experts.shape, tokens, routing, static_cast<uint64_t>(tokens), shared_y, stream().get());
  }

  // y of one call, poisoned before; the workspace is poisoned too and initialised as a caller must.
  DeviceBuffer run(const Layer& l, const Tier& tier) {
    const MoePlan plan = make_plan(experts.shape, l.tokens, tier);
    DeviceBuffer workspace(plan.workspace_bytes);
    gpu::fill(workspace.data(), 0xff, workspace.bytes(), stream().get());
    init_moe_workspace(workspace.data(), plan_input(experts.shape, l.tokens, tier), stream().get());
    return run(l, tier, plan, workspace);
  }
  DeviceBuffer run(const Layer& l, const Tier& tier, const MoePlan& plan, const DeviceBuffer& workspace) {
    DeviceBuffer y(l.y.bytes());
    gpu::fill(y.data(), 0xff, y.bytes(), stream().get());
    MoeGpuArgs args = layer_args(experts, l, tier, workspace);
    args.y = y.as<bf16>();
    moe_gpu(args, plan, stream().get());
    stream().synchronize();
    return y;
  }

  // Every element of every sampled token (none given: all) inside its bounds.
  void expect_inside(const DeviceBuffer& y, const Reference& reference) {
    const Comparison c = compare(y.as<bf16>(), reference, experts.shape.hidden, stream().get());
    EXPECT_EQ(c.outside, 0u) << "elements outside their bounds (moe_reference.cuh); relative error " << c.relative
                             << ", bound " << c.width;
    Worst& worst = worst_of[reference.act == ActFormat::kNvfp4];
    worst = {std::max(worst.relative, c.relative), std::max(worst.width, c.width)};
  }
  void expect_same(const DeviceBuffer& a, const DeviceBuffer& b, const char* what) {
    ASSERT_EQ(a.bytes(), b.bytes()) << what;
    EXPECT_EQ(differences(a.data(), b.data(), a.bytes() / 2, stream().get()), 0u) << what;
  }

  // Twice, on workspaces of their own: right, and the same bits.
  void expect_right(const Layer& l, const Tier& tier, const Reference& reference) {
    SCOPED_TRACE(::testing::Message() << experts.shape.name << ", " << tier.name
                                      << (tier.act == ActFormat::kNvfp4 ? " a4" : " a16") << ", " << l.tokens
                                      << " tokens");
    const DeviceBuffer y = run(l, tier);
    expect_inside(y, reference);
    expect_same(y, run(l, tier), "the second call");
  }
  // Every tier and activation format that can run this many tokens.
  void expect_right_everywhere(const Layer& l) {
    const Reference a16 = make_reference(experts.linear(), l, ActFormat::kBf16, stream().get());
    const Reference a4 = make_reference(experts.linear(), l, ActFormat::kNvfp4, stream().get());
    for (const Tier& tier : {Tier{"auto"}, Tier{"ring"}, Tier{"stream"}, Tier{"tiled"}})
      if (tier_can_run(experts.shape, l.tokens, tier)) expect_right(l, tier, a16);
    expect_right(l, {"auto", ActFormat::kNvfp4}, a4);
  }

  void TearDown() override {
    for (const int a4 : {0, 1})
      if (worst_of[a4].width > 0)
        printf("  %s: largest relative error %.2e, largest relative bound %.2e\n", a4 ? "a4" : "a16",
               worst_of[a4].relative, worst_of[a4].width);
  }

  const gpu::Stream& stream() {  // made late: without a GPU there is none
    if (!own_stream) own_stream.emplace();
    return *own_stream;
  }
  std::optional<gpu::Stream> own_stream;
  ExpertSet experts;
  int num_sms = 0;
  struct Worst {
    double relative = 0, width = 0;
  };
  Worst worst_of[2];  // a16, a4
};

}  // namespace dsv4::testing
