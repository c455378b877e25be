// MoE layer on Hopper: both tiers and both activation formats against the bounds of moe_reference.cuh, shape by shape and
// routing by routing; large token counts on a sample of their tokens; ten thousand random cases.
#include <array>
#include <cstdlib>
#include <stdexcept>

#include "gpu/moe_fixture.cuh"

namespace dsv4::testing {
namespace {

TEST_F(MoeGpu, MatchesReferenceOnOddShapes) {
  for (const CaseShape& s :
       {CaseShape{"tiny", 64, 64, 3, 1}, *find_case_shape("odd"), *find_case_shape("demo"), *find_case_shape("wide"),
        CaseShape{"192", 192, 448, 5, 5}, CaseShape{"tall", 64, 1984, 4, 2}, CaseShape{"flat", 2112, 64, 4, 2},
        CaseShape{"34 slabs", 8512, 64, 3, 2}}) {
    use(s);
    for (const int64_t tokens : {1, 2, 3, 5, 33, 150})
      expect_right_everywhere(layer(tokens, Routing::kUniform, tokens % 2 == 1));
  }
}

TEST_F(MoeGpu, EveryTokenCountUpTo130) {
  use(*find_case_shape("small"));
  for (int64_t tokens = 1; tokens <= 130; ++tokens)
    expect_right_everywhere(layer(tokens, Routing::kZipf, tokens % 2 == 1));
}

TEST_F(MoeGpu, AllTokensOnOneExpertAndEmptyExperts) {
  use(*find_case_shape("demo"));
  for (const int64_t tokens : {9, 130, 300, 1000}) expect_right_everywhere(layer(tokens, Routing::kOneExpert, false));
}

TEST_F(MoeGpu, UnusedSlotsAndTokensWithoutExperts) {
  use(*find_case_shape("demo"));
  expect_right_everywhere(layer(40, Routing::kHoles, true));
  expect_right_everywhere(layer(500, Routing::kHoles, true));
  expect_right_everywhere(layer(40, Routing::kNone, true));
  expect_right_everywhere(layer(40, Routing::kNone, false));
}

TEST_F(MoeGpu, OneExpertNamedTwiceByAToken) {
  use(*find_case_shape("odd"));
  std::vector<int32_t> idx;
  for (int t = 0; t < 20; ++t) idx.insert(idx.end(), {5, t % 7, 5});
  expect_right_everywhere(layer(idx, false));
  expect_right_everywhere(layer(300, Routing::kDuplicates, true));
}

TEST_F(MoeGpu, ZeroTokensTouchNothing) {
  use({"tiny", 64, 64, 3, 1});
  MoeGpuArgs args{};
  args.shape = {64, 64, 3, 1};
  moe_gpu(args, MoePlan{}, stream().get());
  stream().synchronize();
}

TEST_F(MoeGpu, WeightsApartFromChunksAreRefused) {
  use(*find_case_shape("small"));
  const Layer l = layer(4, Routing::kUniform, false);
  const MoePlan plan = make_plan(experts.shape, 4, {});
  DeviceBuffer workspace(plan.workspace_bytes);
  MoeGpuArgs args = layer_args(experts, l, {}, workspace);
  args.experts.fc1 += kMoeChunkBytes;
  EXPECT_THROW(moe_gpu(args, plan, stream().get()), std::runtime_error);
  EXPECT_THROW(sm90::pack_moe_expert(experts.expert(0), experts.shape.hidden, experts.shape.inter, 0,
                                     experts.fc1.as<uint8_t>() + kMoeChunkBytes, experts.fc2.as<uint8_t>(),
                                     experts.alpha.as<float>(), {}, stream().get()),
               std::runtime_error);
  EXPECT_THROW(sm90::find_moe_sides({}, experts.fc1.as<uint8_t>(), kMoeSlabPairBytes - 1, nullptr, stream().get()),
               std::runtime_error);
}

TEST_F(MoeGpu, SmallWorkspaceIsRefused) {
  MoeGpuArgs args{};
  args.shape = {64, 64, 3, 1};
  args.num_tokens = 4;
  EXPECT_THROW(moe_gpu(args, MoePlan{}, stream().get()), std::runtime_error);
}

// Gate and up with globals far apart, and experts with globals far apart: nothing may take one for the other.
TEST_F(MoeGpu, GlobalsOfEveryMatrixAreItsOwn) {
  use(*find_case_shape("demo"));
  for (int e = 0; e < experts.shape.experts; ++e) {
    experts.host_globals[3 * e] *= e % 2 ? 0.125f : 3.0f;
    experts.host_globals[3 * e + 1] *= e % 3 ? 1.7f : 0.03f;
    experts.host_globals[3 * e + 2] *= 1.0f + 0.37f * e;
    experts.pack(e, stream().get());
  }
  gpu::copy_to_device(experts.globals.data(), experts.host_globals.data(), experts.globals.bytes(), stream().get());
  for (const int64_t tokens : {4, 90}) expect_right_everywhere(layer(tokens, Routing::kUniform, false));
}

// Where weights lie and which CTA takes which task changes no bit, also when both are wrong about the L2.
TEST_F(MoeGpu, SidesOfTheL2ChangeNoBits) {
  for (const CaseShape& s :
       {*find_case_shape("odd"), *find_case_shape("wide"), CaseShape{"2048/12", 2048, 1024, 12, 6}})
    for (const int64_t tokens : {2, 12, 300}) {
      const auto outputs = [&](SideSource sides) {
        use(s, ScaleRange::kAll, sides);
        const Layer l = layer(tokens, Routing::kZipf, true);
        std::vector<DeviceBuffer> y;
        for (const Tier& tier : {Tier{"ring"}, Tier{"stream"}, Tier{"tiled"}, Tier{"tiled", ActFormat::kNvfp4}})
          if (tier_can_run(s, tokens, tier)) y.push_back(run(l, tier));
        return y;
      };
      const std::vector<DeviceBuffer> known = outputs(SideSource::kFound), unknown = outputs(SideSource::kNone),
                                      random = outputs(SideSource::kRandom);
      for (size_t i = 0; i < known.size(); ++i) {
        SCOPED_TRACE(::testing::Message() << s.name << ", " << tokens << " tokens, tier " << i);
        expect_same(known[i], unknown[i], "sides not known");
        expect_same(known[i], random[i], "random sides");
      }
    }
}

// The tiled tier's lists of larger tiles on one pair of CTAs, so that their rings wrap. The last ticket of fc2 has one strip for both CTAs. Small
// enough for the sanitizers.
TEST_F(MoeGpu, FewCtasLargerTiles) {
  use({"wrap", 1088, 128, 4, 2});
  for (const int64_t tokens : {60, 200}) {
    const Layer l = layer(tokens, Routing::kUniform, false);
    const Reference reference = make_reference(experts.linear(), l, ActFormat::kBf16, stream().get());
    expect_right(l, {"tiled", ActFormat::kBf16, num_sms - 2}, reference);
  }
}
// One CTA is a pair of its own; of three or five one stays out.
TEST_F(MoeGpu, FewCtasOddNumbers) {
  use({"wrap", 1088, 320, 4, 2});
  for (const int64_t tokens : {12, 60, 200, 300}) {
    const Layer l = layer(tokens, Routing::kHoles, false);
    for (const ActFormat act : {ActFormat::kBf16, ActFormat::kNvfp4}) {
      const Reference reference = make_reference(experts.linear(), l, act, stream().get());
      for (const int ctas : {1, 3, 5}) expect_right(l, {"tiled", act, num_sms - ctas}, reference);
    }
  }
}

// Strips of a multiple of 16, which the ring tier deals to the sides of the L2: few and odd numbers of CTAs, rings that wrap, slots on both
// sides of what one warp routes (32).
TEST_F(MoeGpu, FewCtasOnBothSides) {
  use({"sides", 2048, 1024, 12, 6});
  for (const Routing routing : {Routing::kHoles, Routing::kDuplicates, Routing::kNone})
    for (const int64_t tokens : {1, 5, 6}) {
      const Layer l = layer(tokens, routing, false);
      const Reference reference = make_reference(experts.linear(), l, ActFormat::kBf16, stream().get());
      for (const int ctas : {1, 2, 3, num_sms - 1, num_sms})
        expect_right(l, {"ring", ActFormat::kBf16, num_sms - ctas}, reference);
    }
}

TEST_F(MoeGpu, FlashShape) {
  use({"flash/32", 4096, 2048, 32, 6});
  for (const int64_t tokens : {1, 12, 200}) expect_right_everywhere(layer(tokens, Routing::kUniform, false));
}

TEST_F(MoeGpu, ProShape) {
  use({"pro/16", 7168, 3072, 16, 6});
  for (const int64_t tokens : {1, 40}) expect_right_everywhere(layer(tokens, Routing::kZipf, true));
}

// A sample of tokens, each computed whole: the first, the last, and every so often.
TEST_F(MoeGpu, LargeTokenCounts) {
  use({"flash/32", 4096, 2048, 32, 6});
  for (const int64_t tokens : {1024, 4096, 8192, 32768})
    for (const Routing routing : {Routing::kUniform, Routing::kZipf}) {
      if (tokens == 8192 && routing == Routing::kZipf) continue;  // time
      const Layer l = layer(tokens, routing, false);
      std::vector<int32_t> sample;
      for (int64_t t = 0; t < tokens; t += tokens / 24) sample.push_back(static_cast<int32_t>(t));
      sample.push_back(static_cast<int32_t>(tokens - 1));
      for (const ActFormat act : {ActFormat::kBf16, ActFormat::kNvfp4}) {
        if (act == ActFormat::kNvfp4 && tokens != 4096) continue;
        expect_right(l, {"auto", act}, make_reference(experts.linear(), l, act, stream().get(), sample));
      }
    }
}

// DSV4_MOE_RANDOM_CASES changes the number.
TEST_F(MoeGpu, RandomCases) {
  const char* given = std::getenv("DSV4_MOE_RANDOM_CASES");
  const int cases = given ? std::atoi(given) : 10000;
  constexpr int64_t kMaxTokens = 160;
  constexpr int kSharedInter = 192;
  use(*find_case_shape("small"));
  use_shared(kSharedInter);
  const CaseShape& s = experts.shape;
  DeviceBuffer workspace(
      std::max({make_plan(s, kMaxTokens, {"ring", ActFormat::kBf16, 0, kSharedInter}).workspace_bytes,
                make_plan(s, kMaxTokens, {"tiled", ActFormat::kBf16, 0, kSharedInter}).workspace_bytes,
                make_plan(s, kMaxTokens, {"tiled", ActFormat::kNvfp4, 0, kSharedInter}).workspace_bytes}));
  gpu::fill(workspace.data(), 0xff, workspace.bytes(), stream().get());
  init_moe_workspace(workspace.data(), plan_input(s, kMaxTokens, {}), stream().get());
  int done = 0;
  for (; done < cases && !HasFailure(); ++done) {
    const uint64_t r = mix(done);
    const int64_t tokens = 1 + (r >> 8) % (r % 4 == 0 ? kMaxTokens : 24);
    const auto routing = static_cast<Routing>((r >> 40) % 6);
    Tier tier =
        std::array{Tier{"ring"}, Tier{"stream"}, Tier{"tiled"}, Tier{"tiled", ActFormat::kNvfp4}}[(r >> 50) % 4];
    if (done % 4 == 1) tier.shared_inter = kSharedInter;  // as weights; as output in every other case
    const Layer l = make_layer(s, tokens, routing, done, done % 2 == 0, stream().get());
    SCOPED_TRACE(::testing::Message() << "case " << done << ": " << tokens << " tokens, " << kRoutingNames[int(routing)]
                                      << ", " << tier.name << (tier.shared_inter > 0 ? ", shared expert" : ""));
    expect_inside(run(l, tier, make_plan(s, tokens, tier), workspace),
                  reference_of(l, tier.act, tier.shared_inter > 0));
  }
  printf("  %d random cases\n", done);
}

}  // namespace
}  // namespace dsv4::testing
