// The shared expert given as FP8 weights: in the launch of the decode tiers, and before the tiled one at every size of its own kernels.
#include "gpu/moe_fixture.cuh"

namespace dsv4::testing {
namespace {

class MoeShared : public MoeGpu {
 protected:
  void expect_right_with_shared(int64_t tokens, int inter, Routing routing = Routing::kUniform,
                                std::vector<int32_t> sample = {}) {
    SCOPED_TRACE(::testing::Message() << "shared inter " << inter << ", " << kRoutingNames[int(routing)]);
    use_shared(inter);
    const Layer l = layer(tokens, routing, false);
    for (const ActFormat act : {ActFormat::kBf16, ActFormat::kNvfp4}) {
      const Reference reference = reference_of(l, act, true, sample);
      for (const char* name : {"auto", "ring", "stream", "tiled"}) {
        const Tier tier{name, act, 0, inter};
        if (tier_can_run(experts.shape, tokens, tier)) expect_right(l, tier, reference);
      }
    }
  }
};

TEST_F(MoeShared, EveryKernelSize) {
  use(*find_case_shape("odd"));
  for (const int64_t tokens : {1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 200, 257, 512})
    expect_right_with_shared(tokens, 192);
}

// Every count of token rows in its last chunk (8 a chunk in the ring tier, 32 in the streaming one), and more chunks of it than
// there are CTAs, alone or between routed tasks.
TEST_F(MoeShared, EveryTokenCountInOneLaunch) {
  use(*find_case_shape("small"));
  for (int64_t tokens = 1; tokens <= 70; ++tokens)
    expect_right_with_shared(tokens, tokens % 2 ? 64 : 192, tokens % 3 ? Routing::kHoles : Routing::kUniform);
  use({"many chunks", 128, 64, 3, 1});
  for (const Routing routing : {Routing::kNone, Routing::kOneExpert, Routing::kUniform})
    expect_right_with_shared(1000, 320, routing);
}

// Two CTAs do what all do elsewhere, so every ring of every tier wraps; small enough for the sanitizers.
TEST_F(MoeShared, FewCtasWrapTheRings) {
  use({"wrap", 1088, 128, 4, 2});
  use_shared(192);
  const Layer l = layer(12, Routing::kUniform, false);
  for (const int inter : {0, 192}) {
    const Reference reference = reference_of(l, ActFormat::kBf16, inter > 0);
    for (const char* name : {"ring", "stream", "tiled"})
      expect_right(l, {name, ActFormat::kBf16, num_sms - 2, inter}, reference);
  }
}

// The shared expert's own kernels, small enough for the sanitizers.
TEST_F(MoeShared, SmallShapeBeforeTheRoutedExperts) {
  use({"tiny", 192, 64, 3, 1});
  use_shared(128);
  for (const int64_t tokens : {3, 12, 20, 40, 130}) {
    const Layer l = layer(tokens, Routing::kUniform, false);
    expect_right(l, {"tiled", ActFormat::kBf16, 0, 128}, reference_of(l, ActFormat::kBf16, true));
  }
}

TEST_F(MoeShared, OddShapes) {
  for (const CaseShape& s : {CaseShape{"tiny", 64, 64, 3, 1}, *find_case_shape("demo"), *find_case_shape("wide"),
                             CaseShape{"flat", 2112, 64, 4, 2}}) {
    use(s);
    for (const int inter : {64, 448, 1984})
      for (const int64_t tokens : {3, 150}) expect_right_with_shared(tokens, inter);
  }
}

TEST_F(MoeShared, TokensWithoutExpertsHaveItsOutputAlone) {
  use(*find_case_shape("demo"));
  for (const int64_t tokens : {4, 150}) {
    expect_right_with_shared(tokens, 256, Routing::kNone);
    expect_right_with_shared(tokens, 256, Routing::kHoles);
  }
}

TEST_F(MoeShared, FlashShape) {
  use({"flash/16", 4096, 2048, 16, 6});
  for (const int64_t tokens : {1, 30, 100, 300}) expect_right_with_shared(tokens, 2048);
  expect_right_with_shared(4096, 2048, Routing::kUniform, {0, 1, 127, 128, 2000, 4095});
}

TEST_F(MoeShared, ScalesThatAreNoPowersOfTwoAreFound) {
  use({"tiny", 64, 64, 3, 1});
  use_shared(64);
  const float scale = 0.3f;
  gpu::copy_to_device(experts.shared.scales[1].data(), &scale, 4, stream().get());
  const SharedExpert& e = experts.shared;
  const auto matrix = [&](int i) { return sm90::MoeLinearFp8{e.codes[i].as<uint8_t>(), e.scales[i].as<float>()}; };
  const sm90::MoeLinearShared linear{matrix(0), matrix(1), matrix(2)};
  DeviceBuffer wrong(8);
  gpu::fill(wrong.data(), 0, 8, stream().get());
  sm90::pack_moe_shared(linear, 64, 64, e.fc1.as<uint8_t>(), e.fc2.as<uint8_t>(), e.alpha.as<float>(), stream().get());
  // alone in its matrix a scale becomes alpha and is exact; two that are no powers of two apart are not
  sm90::verify_moe_shared(linear, 64, 64, e.fc1.as<uint8_t>(), e.fc2.as<uint8_t>(), e.alpha.as<float>(),
                          wrong.as<unsigned long long>(), stream().get());
  unsigned long long count = 1;
  gpu::copy_to_host(&count, wrong.data(), 8, stream().get());
  stream().synchronize();
  EXPECT_EQ(count, 0u);

  use({"two blocks", 256, 64, 3, 1});
  use_shared(64);
  const float scales[2] = {0.3f, 0.5f};
  gpu::copy_to_device(experts.shared.scales[1].data(), scales, 8, stream().get());
  const sm90::MoeLinearShared two{matrix(0), matrix(1), matrix(2)};
  sm90::pack_moe_shared(two, 256, 64, e.fc1.as<uint8_t>(), e.fc2.as<uint8_t>(), e.alpha.as<float>(), stream().get());
  sm90::verify_moe_shared(two, 256, 64, e.fc1.as<uint8_t>(), e.fc2.as<uint8_t>(), e.alpha.as<float>(),
                          wrong.as<unsigned long long>(), stream().get());
  gpu::copy_to_host(&count, wrong.data(), 8, stream().get());
  stream().synchronize();
  EXPECT_GT(count, 0u);
}

TEST_F(MoeShared, WeightsAndOutputTogetherAreRefused) {
  use({"tiny", 64, 64, 3, 1});
  use_shared(64);
  const Layer l = layer(4, Routing::kUniform, true);
  EXPECT_THROW(run(l, {"auto", ActFormat::kBf16, 0, 64}), std::runtime_error);
}

}  // namespace
}  // namespace dsv4::testing
