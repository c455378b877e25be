// Hyper-connections: the specification's test vector, Sinkhorn, pre/post/head against direct formulas.
#include "ops/hyper_connection/hyper_connection.h"

#include <gtest/gtest.h>

#include "ops/random.h"

namespace dsv4 {
namespace {

TEST(HyperConnection, SplitReproducesTheVectorOfTheSpecification) {  // spec 2.6
  const float scale[3] = {0.5f, 2.0f, 1.0f};
  float base[24] = {0.1f, 0, -0.2f, 0.3f, 0, 0.1f, 0, -0.1f};
  const float m[24] = {0.3f, -0.7f, 1.1f, 0, 0.2f, 0.4f, -0.6f, -1.5f, 0,  1, 2, 3,
                       1,    0,     -1,   2, .5f,  .5f,  0,     -2,    -1, 2, 0, 1};
  const HcShape shape{1, 256, 4, 20, 1e-6f, 1e-6f, false};
  float pre[4], post[4], comb[16];
  hc_split(m, {nullptr, scale, base}, shape, pre, post, comb);
  const float expected_pre[4] = {0.5621775f, 0.4133834f, 0.5866186f, 0.5744435f};
  const float expected_post[4] = {1.1973753f, 1.4218990f, 0.4629504f, 0.0862145f};
  const float expected_comb[16] = {0.0563691f, 0.0785706f, 0.4577150f, 0.4073443f, 0.4318935f, 0.0814738f,
                                   0.0642356f, 0.4223960f, 0.4527213f, 0.2321474f, 0.3017595f, 0.0133708f,
                                   0.0590150f, 0.6078072f, 0.1762889f, 0.1568879f};
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(pre[i], expected_pre[i], 2e-6f);
    EXPECT_NEAR(post[i], expected_post[i], 2e-6f);
  }
  for (int i = 0; i < 16; ++i) EXPECT_NEAR(comb[i], expected_comb[i], 2e-6f) << i;
}

TEST(HyperConnection, PostAppliesTheTransposeAndPreSumsStreams) {
  constexpr int kHidden = 1000, kTokens = 3, kStreams = 4;  // longer than one block, not a multiple of it
  const auto streams = random_floats(kTokens * kStreams * kHidden, 1), out = random_floats(kTokens * kHidden, 2);
  const auto post = random_floats(kTokens * kStreams, 3), comb = random_floats(kTokens * kStreams * kStreams, 4);
  const HcShape shape{kTokens, kHidden, kStreams, 20, 1e-6f, 1e-6f, false};
  ThreadPool pool(2);
  for (CpuIsa isa : {CpuIsa::kReference, best_cpu_isa()}) {
    auto x = streams;
    hc_post(shape, out.data(), post.data(), comb.data(), x.data(), {pool, isa});
    for (int t = 0; t < kTokens; ++t)
      for (int k = 0; k < kStreams; ++k)
        for (int c = 0; c < kHidden; c += 37) {
          double expected = static_cast<double>(post[t * 4 + k]) * out[t * kHidden + c];
          for (int j = 0; j < kStreams; ++j)
            expected += static_cast<double>(comb[t * 16 + j * 4 + k]) * streams[(t * 4 + j) * kHidden + c];
          EXPECT_NEAR(x[(t * 4 + k) * kHidden + c], expected, 1e-5);
        }
  }
}

TEST(HyperConnection, FastPathsMatchTheReference) {
  for (int num_hc : {1, 2, 4}) {
    constexpr int kHidden = 96, kTokens = 70;
    const int num_mix = (2 + num_hc) * num_hc, width = num_hc * kHidden;
    const auto streams = random_floats(kTokens * width, 1), fn = random_floats(num_mix * width, 2, 0.1f);
    const auto scale = random_floats(3, 3), base = random_floats(num_mix, 4);
    const HcShape shape{kTokens, kHidden, num_hc, 20, 1e-6f, 1e-6f, false};
    ThreadPool pool(2);
    const auto run = [&](CpuIsa isa) {
      std::vector<float> y(kTokens * kHidden), post(kTokens * num_hc), comb(kTokens * num_hc * num_hc),
          head(kTokens * kHidden);
      const HcParams params{fn.data(), scale.data(), base.data()};
      hc_pre(shape, params, streams.data(), y.data(), post.data(), comb.data(), {pool, isa});
      hc_head(shape, params, streams.data(), head.data(), {pool, isa});
      for (const auto* part : {&post, &comb, &head}) y.insert(y.end(), part->begin(), part->end());
      return y;
    };
    EXPECT_LT(relative_error(run(best_cpu_isa()), run(CpuIsa::kReference)), 3e-6) << num_hc;
  }
}

}  // namespace
}  // namespace dsv4
