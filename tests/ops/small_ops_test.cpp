// RoPE, RMS norm, router, sampling, vector kernels.
#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "codec/bf16.h"
#include "ops/norm/norm.h"
#include "ops/random.h"
#include "ops/rope/rope.h"
#include "ops/router/router.h"
#include "ops/sampling/sampling.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

TEST(Rope, FrequenciesAreThoseOfTheSpecification) {  // spec 3.3
  const RopeFreqs plain = make_rope_freqs(64, 10000, nullptr);
  const YarnParams yarn{16, 65536, 32, 1};
  const RopeFreqs compressed = make_rope_freqs(64, 160000, &yarn);
  const struct {
    int i;
    float plain, compressed;
  } rows[] = {{0, 1.0f, 1.0f},
              {1, 7.498942e-1f, 6.876560e-1f},
              {8, 1.0e-1f, 5.0e-2f},
              {15, 1.333521e-2f, 3.635539e-3f},
              {16, 1.0e-2f, 2.265625e-3f},
              {20, 3.162278e-3f, 2.969778e-4f},
              {24, 1.0e-3f, 1.953125e-5f},
              {25, 7.498942e-4f, 5.372313e-6f},
              {31, 1.333521e-4f, 5.680529e-7f}};
  for (const auto& row : rows) {
    EXPECT_NEAR(plain.freqs[row.i] / row.plain, 1.0f, 2e-6f) << row.i;
    EXPECT_NEAR(compressed.freqs[row.i] / row.compressed, 1.0f, 2e-6f) << row.i;
  }
}

TEST(Rope, RotatesInterleavedPairsAndInverts) {
  float x[4] = {1, 0, 0, 1};
  const float cos[2] = {0, 1}, sin[2] = {1, 0};
  rope_rotate(x, cos, sin, 2, RopeDirection::kForward);
  EXPECT_EQ(x[0], 0.0f);
  EXPECT_EQ(x[1], 1.0f);
  EXPECT_EQ(x[2], 0.0f);
  EXPECT_EQ(x[3], 1.0f);
  rope_rotate(x, cos, sin, 2, RopeDirection::kInverse);
  EXPECT_EQ(x[0], 1.0f);
  EXPECT_EQ(x[1], 0.0f);
}

TEST(RmsNorm, IsOneRoundingOfTheDefinition) {
  const auto x = random_floats(3 * 50, 1), w = random_floats(50, 2);
  ThreadPool pool(1);
  for (CpuIsa isa : {CpuIsa::kReference, best_cpu_isa()}) {
    std::vector<float> y(3 * 50);
    rms_norm({x.data(), w.data(), y.data(), 3, 50, 50, 50, 1e-6f, true}, {pool, isa});
    for (int r = 0; r < 3; ++r) {
      double squares = 0;
      for (int i = 0; i < 50; ++i) squares += static_cast<double>(x[r * 50 + i]) * x[r * 50 + i];
      for (int i = 0; i < 50; ++i) {
        const double exact = w[i] * x[r * 50 + i] / std::sqrt(squares / 50 + 1e-6);
        EXPECT_EQ(y[r * 50 + i], round_bf16(y[r * 50 + i]));
        EXPECT_NEAR(y[r * 50 + i], exact, std::fabs(exact) * 0.0040);  // half a bf16 step
      }
    }
  }
}

TEST(Router, ScoreFunctionHasTheValuesOfTheSpecification) {  // spec 4.1: sqrt(softplus(z))
  const float z[6] = {-10, -1, 0, 0.5f, 3, 25},
              expected[6] = {0.00673787f, 0.55969788f, 0.83255461f, 0.98695339f, 1.74602043f, 5};
  ThreadPool pool(1);
  int32_t idx[6];
  float weights[6];
  router({.logits = z,
          .topk_idx = idx,
          .topk_weights = weights,
          .num_tokens = 1,
          .num_experts = 6,
          .num_topk = 6,
          .scaling_factor = 1,
          .normalise = false},
         {pool, CpuIsa::kReference});
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(weights[i], expected[i], 2e-6f * expected[i] + 1e-8f);
}

TEST(Router, BiasChoosesButDoesNotWeigh) {
  const float logits[4] = {1, 2, 3, 4}, bias[4] = {100, 0, 0, 0};
  ThreadPool pool(1);
  int32_t idx[2];
  float weights[2], margin = 0;
  router({.logits = logits,
          .bias = bias,
          .topk_idx = idx,
          .topk_weights = weights,
          .margin = &margin,
          .num_tokens = 1,
          .num_experts = 4,
          .num_topk = 2,
          .scaling_factor = 1.5f,
          .normalise = true},
         {pool, CpuIsa::kReference});
  EXPECT_EQ(idx[0], 0);
  EXPECT_EQ(idx[1], 3);
  EXPECT_NEAR(weights[0] + weights[1], 1.5f, 1e-6f);
  EXPECT_LT(weights[0], weights[1]);
  EXPECT_GT(margin, 0.0f);
}

TEST(Router, TiesGoToTheLowestExpertAndHashLayersFollowTheirTable) {
  const float logits[8] = {1, 1, 1, 1, 0, 0, 0, 9};
  const int32_t table[6] = {3, 2, 1, 0, 2, 2}, ids[2] = {1, 2};
  ThreadPool pool(1);
  int32_t idx[4];
  float weights[4];
  RouterArgs args{.logits = logits,
                  .topk_idx = idx,
                  .topk_weights = weights,
                  .num_tokens = 2,
                  .num_experts = 4,
                  .num_topk = 2,
                  .scaling_factor = 1,
                  .normalise = true};
  router(args, {pool, CpuIsa::kReference});
  EXPECT_EQ(std::vector<int32_t>(idx, idx + 4), (std::vector<int32_t>{0, 1, 0, 3}));
  args.hash_table = table;
  args.token_ids = ids;
  router(args, {pool, CpuIsa::kReference});
  EXPECT_EQ(std::vector<int32_t>(idx, idx + 4), (std::vector<int32_t>{0, 1, 2, 2}));
}

TEST(Sampling, GreedyTakesTheLowestIdOfTheBest) {
  const std::vector<float> logits{1, 5, 5, 2};
  SamplingRng rng(1);
  EXPECT_EQ(sample(logits, {.temperature = 0}, rng), 1);
  EXPECT_EQ(argmax(logits), 1);
}

TEST(Sampling, DrawsFollowTheProbabilities) {
  const std::vector<float> logits{std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  SamplingRng rng(42);
  int counts[3] = {};
  for (int i = 0; i < 30000; ++i) ++counts[sample(logits, {}, rng)];
  EXPECT_NEAR(counts[0] / 30000.0, 0.5, 0.015);  // five standard deviations
  EXPECT_NEAR(counts[1] / 30000.0, 0.3, 0.015);
}

TEST(Sampling, FiltersCutTheTail) {
  const std::vector<float> logits{std::log(0.5f), std::log(0.3f), std::log(0.15f), std::log(0.05f)};
  const auto reachable = [&](const SamplingParams& params) {
    SamplingRng rng(7);
    std::vector<bool> seen(4);
    for (int i = 0; i < 3000; ++i) seen[sample(logits, params, rng)] = true;
    return seen;
  };
  EXPECT_EQ(reachable({.top_k = 2}), (std::vector<bool>{true, true, false, false}));
  EXPECT_EQ(reachable({.top_p = 0.7f}), (std::vector<bool>{true, true, false, false}));
  EXPECT_EQ(reachable({.min_p = 0.2f}), (std::vector<bool>{true, true, true, false}));
  EXPECT_EQ(reachable({.top_p = 0.0f}), (std::vector<bool>{true, false, false, false}));
}

TEST(Sampling, SameSeedSameDraws) {
  const auto logits = random_floats(1000, 3);
  SamplingRng a(9), b(9);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(sample(logits, {.top_p = 0.9f}, a), sample(logits, {.top_p = 0.9f}, b));
}

TEST(VecKernels, EveryInstructionSetMatchesTheReference) {
  const VecKernels& ref = vec_kernels(CpuIsa::kReference);
  for (CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa > best_cpu_isa()) continue;
    const VecKernels& vec = vec_kernels(isa);
    for (int64_t n : {1, 7, 8, 16, 31, 64, 100, 515}) {
      const auto x = random_floats(n, 1), w = random_floats(9 * n, 2);
      EXPECT_NEAR(vec.sum_squares(x.data(), n), ref.sum_squares(x.data(), n), 1e-6 * static_cast<double>(n));
      // One head, 9 rows: a tile, a partial tile and single rows on every instruction set.
      std::vector<const float*> rows;
      for (int r = 0; r < 9; ++r) rows.push_back(w.data() + r * n);
      std::vector<float> a(9), b(9);
      vec.attend_scores(x.data(), 1, n, rows.data(), 9, 1.0f, a.data(), 9);
      ref.attend_scores(x.data(), 1, n, rows.data(), 9, 1.0f, b.data(), 9);
      for (int i = 0; i < 9; ++i) EXPECT_NEAR(a[i], b[i], 1e-5 * std::sqrt(n) * 4);
      auto e = x, f = x;
      const float se = vec.exp_sum(e.data(), n, 2.5f), sf = ref.exp_sum(f.data(), n, 2.5f);
      EXPECT_NEAR(se / sf, 1.0f, 1e-6f * 3);
      for (int64_t i = 0; i < n; ++i) EXPECT_NEAR(e[i] / f[i], 1.0f, 3e-7f);
      auto p = x, q = x;
      vec.round_bf16(p.data(), n);
      ref.round_bf16(q.data(), n);
      EXPECT_EQ(p, q);
      std::vector<uint16_t> c(n), d(n);
      vec.encode_bf16(x.data(), n, c.data());
      ref.encode_bf16(x.data(), n, d.data());
      EXPECT_EQ(c, d);
    }
  }
}

TEST(VecKernels, ExpCoversUnderflowAndMinusInfinity) {
  for (CpuIsa isa : {CpuIsa::kReference, best_cpu_isa()}) {
    std::vector<float> x{0, -1, -50, -87, -104, -1e30f, -std::numeric_limits<float>::infinity(), -0.0f, -3};
    vec_kernels(isa).exp_sum(x.data(), 9, 0.0f);
    EXPECT_EQ(x[0], 1.0f);
    EXPECT_NEAR(x[1], 0.36787944f, 1e-7f);
    EXPECT_NEAR(x[3] / 1.6458115e-38f, 1.0f, 1e-5f);
    EXPECT_LT(x[4], 1e-38f);
    EXPECT_EQ(x[5], 0.0f);
    EXPECT_EQ(x[6], 0.0f);
  }
}

}  // namespace
}  // namespace dsv4
