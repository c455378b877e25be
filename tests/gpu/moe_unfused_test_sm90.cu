// The fused MoE layer against the same layer from separate operations on the GPU, and against the CPU op, from the same bytes.
#include <cstring>

#include "base/threads.h"
#include "gpu/moe_fixture.cuh"
#include "gpu/moe_unfused.cuh"
#include "ops/moe/moe.h"

namespace dsv4::testing {
namespace {

template <class T>
std::vector<T> to_host(const void* device, int64_t count, const gpu::Stream& stream) {
  std::vector<T> host(static_cast<size_t>(count));
  gpu::copy_to_host(host.data(), device, count * static_cast<int64_t>(sizeof(T)), stream.get());
  stream.synchronize();
  return host;
}

// What fc2 of the fused tiled tier read, slot by slot: h without its global (BF16 bits), and the globals (a4).
struct FusedH {
  std::vector<uint16_t> h;  // [slots, inter]
  std::vector<float> global;
};
FusedH read_fused_h(const CaseShape& s, const Layer& l, const Tier& tier, const DeviceBuffer& workspace,
                    const gpu::Stream& stream) {
  const MoeWorkspace layout = layout_moe_workspace(plan_input(s, l.tokens, tier), MoeTier::kTiled);
  const int64_t slots = l.tokens * s.topk, rows = sm90::moe_max_rows(slots, s.experts);
  const char* base = workspace.as<char>();
  const auto operand = to_host<uint16_t>(base + layout.h, rows * s.inter, stream);
  const auto slot_row = to_host<int32_t>(base + layout.slot_row, slots, stream);
  const int64_t max_tiles = sm90::moe_max_tiles(slots, s.experts);
  const auto num_tiles = to_host<int32_t>(base + layout.num_tiles, sm90::kTileLists, stream);
  const auto tiles = to_host<sm90::MoeTile>(base + layout.tiles, sm90::kTileLists * max_tiles, stream);
  std::vector<const sm90::MoeTile*> tile_of(static_cast<size_t>(rows));
  for (int list = 0; list < sm90::kTileLists; ++list)
    for (int i = 0; i < num_tiles[size_t(list)]; ++i) {
      const sm90::MoeTile& tile = tiles[size_t(list * max_tiles + i)];
      for (int r = 0; r < tile.rows; ++r) tile_of[size_t(tile.first_row + r)] = &tile;
    }
  FusedH result{std::vector<uint16_t>(size_t(slots * s.inter)), std::vector<float>(size_t(slots), 1.0f)};
  std::vector<float> globals;
  if (tier.act == ActFormat::kNvfp4) globals = to_host<float>(base + layout.h_global, rows, stream);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int row = slot_row[size_t(slot)];
    if (row < 0) continue;
    const sm90::MoeTile& tile = *tile_of[size_t(row)];
    const int r = row - tile.first_row;
    if (!globals.empty()) result.global[size_t(slot)] = globals[size_t(row)];
    for (int c = 0; c < s.inter; ++c) {
      const int position = moe_kernel_column(c % 64), chunk = position / 8 ^ (r & 7);
      const int64_t at =
          int64_t(tile.first_row) * s.inter + int64_t(c / 64) * tile.padded * 64 + r * 64 + chunk * 8 + position % 8;
      result.h[size_t(slot * s.inter + c)] = operand[size_t(at)];
    }
  }
  return result;
}

class MoeUnfused : public MoeGpu {
 protected:
  // Every number that fc2 reads is the same: e2m1 * sf of each element and the row's global. (Under the run-time rule these
  // determine codes and scale: the largest element of a group has code 6, a zero group scale 0.) Outputs: same bits as well,
  // because fc2 and the combine add in the same order too; and both inside the bounds.
  void expect_same_layer(int64_t tokens, Routing routing, ActFormat act) {
    SCOPED_TRACE(::testing::Message() << experts.shape.name << (act == ActFormat::kNvfp4 ? " a4, " : " a16, ") << tokens
                                      << " tokens, " << kRoutingNames[int(routing)]);
    const CaseShape& s = experts.shape;
    const Layer l = layer(tokens, routing, tokens % 2 == 1);
    const Tier tier{"tiled", act};
    const MoePlan plan = make_plan(s, tokens, tier);
    DeviceBuffer workspace(plan.workspace_bytes);
    gpu::fill(workspace.data(), 0xff, workspace.bytes(), stream().get());
    init_moe_workspace(workspace.data(), plan_input(s, tokens, tier), stream().get());
    const DeviceBuffer y = run(l, tier, plan, workspace);
    const FusedH fused = read_fused_h(s, l, tier, workspace, stream());
    const UnfusedResult unfused = run_unfused(experts, l, act, 10.0f, stream().get());
    const auto row_slot = to_host<int32_t>(unfused.row_slot.data(), tokens * s.topk, stream());
    const auto h = to_host<uint16_t>(unfused.h.data(), tokens * s.topk * s.inter, stream());
    const auto global = to_host<float>(unfused.h_global.data(), tokens * s.topk, stream());
    int64_t different = 0, compared = 0, globals = 0;
    for (size_t row = 0; row < row_slot.size() && row_slot[row] >= 0; ++row) {
      const size_t slot = size_t(row_slot[row]);
      globals += std::memcmp(&global[row], &fused.global[slot], 4) != 0;
      for (int c = 0; c < s.inter; ++c) {
        uint16_t a = h[row * s.inter + c], b = fused.h[slot * s.inter + c];
        different += a != b;
        ++compared;
      }
    }
    EXPECT_EQ(different, 0) << "of " << compared << " elements of h";
    EXPECT_EQ(globals, 0) << "globals of rows of h";
    const Reference reference = make_reference(experts.linear(), l, act, stream().get());
    expect_inside(y, reference);
    expect_inside(unfused.y, reference);
    EXPECT_EQ(differences(y.data(), unfused.y.data(), tokens * s.hidden, stream().get()), 0u) << "elements of y";
    total += compared;
  }
  int64_t total = 0;
};

TEST_F(MoeUnfused, QuantisedHAndOutputAreTheSameBits) {
  for (const char* name : {"small", "odd", "demo", "wide"}) {
    use(*find_case_shape(name));
    for (const int64_t tokens : {1, 7, 64, 333})
      for (const Routing routing : {Routing::kUniform, Routing::kZipf, Routing::kHoles, Routing::kDuplicates})
        for (const ActFormat act : {ActFormat::kNvfp4, ActFormat::kBf16}) expect_same_layer(tokens, routing, act);
  }
  printf("  %lld elements of h compared\n", static_cast<long long>(total));
}

TEST_F(MoeUnfused, FlashShape) {
  use({"flash/16", 4096, 2048, 16, 6});
  for (const int64_t tokens : {5, 200}) expect_same_layer(tokens, Routing::kUniform, ActFormat::kNvfp4);
  expect_same_layer(64, Routing::kZipf, ActFormat::kBf16);
}

// ---- CPU ----

// The CPU op's y on the same bytes, on the device for comparison.
DeviceBuffer cpu_layer(const ExpertSet& set, const Layer& l, ActFormat act, bool with_shared,
                       const gpu::Stream& stream) {
  const CaseShape& s = set.shape;
  const int64_t n = int64_t(s.experts) * s.hidden * s.inter, per = int64_t(s.hidden) * s.inter;
  std::vector<uint8_t> codes[3], sf[3];
  for (int i = 0; i < 3; ++i)
    codes[i] = to_host<uint8_t>(set.codes[i].data(), n / 2, stream),
    sf[i] = to_host<uint8_t>(set.sf[i].data(), n / 16, stream);
  std::vector<ExpertWeights> experts(static_cast<size_t>(s.experts));
  for (int e = 0; e < s.experts; ++e) {
    Weight* const weights[3] = {&experts[size_t(e)].w1, &experts[size_t(e)].w3, &experts[size_t(e)].w2};
    for (int i = 0; i < 3; ++i) {
      WeightView& v = weights[i]->view;
      v.format = WeightFormat::kNvfp4;
      v.rows = i == 2 ? s.hidden : s.inter, v.cols = i == 2 ? s.inter : s.hidden;
      v.data = codes[i].data() + e * per / 2, v.sf = sf[i].data() + e * per / 16;
      v.global = {set.host_globals[size_t(3 * e + i)]};
    }
  }
  ExpertWeights shared;
  std::vector<uint8_t> shared_codes[3];
  if (with_shared) {
    Weight* const weights[3] = {&shared.w1, &shared.w3, &shared.w2};
    for (int i = 0; i < 3; ++i) {
      shared_codes[i] = to_host<uint8_t>(set.shared.codes[i].data(), set.shared.codes[i].bytes(), stream);
      WeightView& v = weights[i]->view;
      v.format = WeightFormat::kFp8Block;
      v.rows = i == 2 ? s.hidden : set.shared.inter, v.cols = i == 2 ? set.shared.inter : s.hidden;
      v.data = shared_codes[i].data(), v.block_scales = set.shared.host_scales[i].data();
    }
  }
  std::vector<float> x, y(static_cast<size_t>(l.tokens * s.hidden));
  for (const uint16_t bits : to_host<uint16_t>(l.x.data(), l.tokens * s.hidden, stream))
    x.push_back(decode_bf16({bits}));
  MoeArgs args{};
  args.x = x.data(), args.topk_idx = l.host_idx.data(), args.topk_weights = l.host_rho.data(), args.y = y.data(),
  args.experts = experts.data();
  args.num_tokens = l.tokens, args.hidden = s.hidden, args.inter = s.inter, args.num_experts = s.experts,
  args.num_topk = s.topk;
  args.swiglu_limit = 10.0f, args.precision.act = act;
  args.shared = with_shared ? &shared : nullptr;
  ThreadPool pool(0);
  moe(args, CpuContext{pool});
  DeviceBuffer device(static_cast<int64_t>(y.size()) * 4);
  gpu::copy_to_device(device.data(), y.data(), device.bytes(), stream.get());
  stream.synchronize();
  return device;
}

class MoeCpu : public MoeGpu {
 protected:
  // Both inside the same bounds, from the same bytes, inputs and routing. shared_inter 0: no shared expert.
  void expect_both_inside(int64_t tokens, Routing routing, int shared_inter = 0) {
    const Layer l = layer(tokens, routing, false);
    if (shared_inter > 0) use_shared(shared_inter);
    for (const ActFormat act : {ActFormat::kBf16, ActFormat::kNvfp4}) {
      SCOPED_TRACE(::testing::Message() << experts.shape.name << (act == ActFormat::kNvfp4 ? " a4, " : " a16, ")
                                        << tokens << " tokens");
      const Reference reference = reference_of(l, act, shared_inter > 0);
      const DeviceBuffer cpu = cpu_layer(experts, l, act, shared_inter > 0, stream());
      const Comparison c = compare(cpu.as<float>(), reference, experts.shape.hidden, stream().get());
      EXPECT_EQ(c.outside, 0u) << "elements of the CPU op outside their bounds; relative error " << c.relative
                               << ", bound " << c.width;
      for (const char* name : {"auto", "ring", "stream", "tiled"}) {
        SCOPED_TRACE(name);
        const Tier tier{name, act, 0, shared_inter};
        if (tier_can_run(experts.shape, tokens, tier)) expect_inside(run(l, tier), reference);
      }
    }
  }
};

TEST_F(MoeCpu, SameBytesGiveTheSameLayer) {
  for (const char* name : {"small", "odd", "demo"}) {
    use(*find_case_shape(name));
    for (const int64_t tokens : {1, 3, 20, 70})
      expect_both_inside(tokens, tokens == 20 ? Routing::kDuplicates : Routing::kUniform);
  }
  use({"wide/8", 1088, 576, 8, 4});
  expect_both_inside(12, Routing::kZipf);
}

TEST_F(MoeCpu, SameBytesGiveTheSameLayerWithASharedExpert) {
  use(*find_case_shape("odd"));
  for (const int64_t tokens : {1, 20, 140}) expect_both_inside(tokens, Routing::kUniform, 192);
  use(*find_case_shape("demo"));
  for (const int64_t tokens : {5, 70}) expect_both_inside(tokens, Routing::kDuplicates, 320);
}

}  // namespace
}  // namespace dsv4::testing
