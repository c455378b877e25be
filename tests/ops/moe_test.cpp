// moe: every instruction set against the reference (a4 bit for bit), routing corner cases, and the promises of the contract.
#include "ops/moe/moe.h"

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/gemm/gemm_pack.h"
#include "ops/moe/swiglu.h"
#include "ops/op_test_util.h"

namespace dsv4::test {
namespace {

struct Layer {
  std::vector<OwnedWeight> storage;
  std::vector<ExpertWeights> experts;
  ExpertWeights shared;
  int64_t hidden, inter;
};

Layer make_layer(std::mt19937& rng, int num_experts, int64_t hidden, int64_t inter, int64_t shared_inter,
                 WeightFormat format, WeightFormat shared_format) {
  Layer layer{{}, {}, {}, hidden, inter};
  const auto expert = [&](WeightFormat f, int64_t width) {
    ExpertWeights e;
    for (Weight* w : {&e.w1, &e.w3, &e.w2}) {
      const bool down = w == &e.w2;
      layer.storage.push_back(random_weight(rng, f, down ? hidden : width, down ? width : hidden));
      *w = layer.storage.back().weight;
    }
    return e;
  };
  for (int i = 0; i < num_experts; ++i) layer.experts.push_back(expert(format, inter));
  layer.shared = expert(shared_format, shared_inter);
  return layer;
}

void pack(Layer& layer, CpuIsa isa) {
  ThreadPool pool(2);
  std::vector<Weight*> list;
  for (ExpertWeights& e : layer.experts) list.insert(list.end(), {&e.w1, &e.w3, &e.w2});
  list.insert(list.end(), {&layer.shared.w1, &layer.shared.w3, &layer.shared.w2});
  pack_weights(list, {pool, isa});
}

struct Routing {
  std::vector<int32_t> idx;
  std::vector<float> weights;
  int num_topk;
};

// Distinct experts per token, some slots unused, expert 1 never chosen.
Routing random_routing(std::mt19937& rng, int64_t num_tokens, int num_topk, int num_experts) {
  Routing routing{{}, {}, num_topk};
  std::uniform_real_distribution<float> weight(0.05f, 1.0f);
  std::uniform_int_distribution<int> expert(0, num_experts - 1), percent(0, 99);
  for (int64_t token = 0; token < num_tokens; ++token) {
    std::vector<int32_t> chosen;
    while (static_cast<int>(chosen.size()) < num_topk) {
      const int e = expert(rng);
      if (e != 1 && std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
    }
    for (int32_t e : chosen) {
      routing.idx.push_back(percent(rng) < 15 ? -1 : e);
      routing.weights.push_back(weight(rng));
    }
  }
  return routing;
}

std::vector<float> run_moe(const Layer& layer, const Routing& routing, const std::vector<float>& x, int64_t num_tokens,
                           Precision precision, bool with_shared, CpuIsa isa, int threads) {
  ThreadPool pool(threads);
  std::vector<float> y(static_cast<size_t>(num_tokens * layer.hidden), -1.0f);
  MoeArgs args{};
  args.x = x.data();
  args.topk_idx = routing.idx.data();
  args.topk_weights = routing.weights.data();
  args.y = y.data();
  args.experts = layer.experts.data();
  args.shared = with_shared ? &layer.shared : nullptr;
  args.num_tokens = num_tokens;
  args.hidden = layer.hidden;
  args.inter = layer.inter;
  args.num_experts = static_cast<int>(layer.experts.size());
  args.num_topk = routing.num_topk;
  args.swiglu_limit = 10.0f;
  args.precision = precision;
  moe(args, {pool, isa});
  return y;
}

const Precision kExact = Precision::make_exact();
constexpr Precision kA16{false, ActFormat::kBf16, KvFormat::kBf16, IndexFormat::kBf16};
constexpr Precision kA4{false, ActFormat::kNvfp4, KvFormat::kBf16, IndexFormat::kBf16};

double relative_error(const std::vector<float>& y, const std::vector<float>& expected) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < y.size(); ++i) {
    error += std::pow(static_cast<double>(y[i]) - expected[i], 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(error / norm);
}

struct Case {
  int64_t hidden, inter, shared_inter;
};
constexpr Case kCases[] = {{64, 32, 32}, {80, 48, 112}, {256, 128, 128}, {272, 144, 96}};

TEST(Moe, ExactMatchesReferenceInEveryFormat) {
  std::mt19937 rng(1);
  for (const Case& c : kCases) {
    for (WeightFormat format : kAllFormats) {
      Layer layer = make_layer(rng, 7, c.hidden, c.inter, c.shared_inter, format, WeightFormat::kF32);
      for (int64_t num_tokens : {1, 3, 9, 40}) {
        const Routing routing = random_routing(rng, num_tokens, 3, 7);
        const std::vector<float> x = random_floats(rng, num_tokens * c.hidden, 1.0f, false);
        const auto expected = run_moe(layer, routing, x, num_tokens, kExact, true, CpuIsa::kReference, 1);
        for (CpuIsa isa : vector_isas()) {
          const auto y = run_moe(layer, routing, x, num_tokens, kExact, true, isa, 2);
          // Two dot products of <= 272 binary32 terms: relative error of each about sqrt(272) * 2^-24 of the norm of its
          // terms, cancellation in random sums at most another 20: 272 * 2^-24 * 20 < 4e-4. A wrong rounding step (bf16:
          // 2^-9) or a wrong term is far above.
          EXPECT_LT(relative_error(y, expected), 4e-4) << cpu_isa_name(isa) << " " << format_name(format);
        }
      }
    }
  }
}

TEST(Moe, A16MatchesReferenceUpToBf16Ties) {
  std::mt19937 rng(2);
  for (const Case& c : kCases) {
    for (WeightFormat shared_format : {WeightFormat::kBf16, WeightFormat::kFp8Block}) {
      Layer layer = make_layer(rng, 7, c.hidden, c.inter, c.shared_inter, WeightFormat::kNvfp4, shared_format);
      const Routing routing = random_routing(rng, 21, 3, 7);
      const std::vector<float> x = random_floats(rng, 21 * c.hidden, 1.0f, true);
      const auto expected = run_moe(layer, routing, x, 21, kA16, true, CpuIsa::kReference, 1);
      for (CpuIsa isa : vector_isas()) {
        const auto y = run_moe(layer, routing, x, 21, kA16, true, isa, 2);
        // A sum near a bf16 tie may round the other way: single values off by 2^-8 relative, rarely. In norm: well below
        // one bf16 step (2^-9) of everything.
        EXPECT_LT(relative_error(y, expected), 0x1p-10) << cpu_isa_name(isa);
      }
    }
  }
}

TEST(Moe, A4IsBitwiseEqualToReference) {
  std::mt19937 rng(3);
  for (const Case& c : kCases) {
    Layer layer = make_layer(rng, 7, c.hidden, c.inter, c.shared_inter, WeightFormat::kNvfp4, WeightFormat::kBf16);
    Layer packed = layer;
    pack(packed, best_cpu_isa());
    for (int64_t num_tokens : {1, 2, 5, 8, 13, 33}) {
      const Routing routing = random_routing(rng, num_tokens, 3, 7);
      std::vector<float> x = random_floats(rng, num_tokens * c.hidden, 1.0f, true);
      std::fill(x.begin(), x.begin() + 16, 0.0f);                                           // an all-zero group
      if (num_tokens > 1) std::fill(x.begin() + c.hidden, x.begin() + 2 * c.hidden, 0.0f);  // an all-zero row
      const auto expected = run_moe(layer, routing, x, num_tokens, kA4, false, CpuIsa::kReference, 1);
      for (CpuIsa isa : vector_isas()) {
        for (const Layer* l : {&layer, &packed}) {
          const auto y = run_moe(*l, routing, x, num_tokens, kA4, false, isa, 2);
          ASSERT_EQ(0, std::memcmp(y.data(), expected.data(), y.size() * 4))
              << cpu_isa_name(isa) << (l == &packed ? " packed" : "") << " hidden " << c.hidden << " tokens "
              << num_tokens;
        }
      }
    }
  }
}

TEST(Moe, A4HandlesInfinityAndNanLikeTheReference) {
  std::mt19937 rng(4);
  Layer layer = make_layer(rng, 3, 64, 32, 32, WeightFormat::kNvfp4, WeightFormat::kBf16);
  const Routing routing{{0, 2, 0, 2}, {0.5f, 0.5f, 0.25f, 0.75f}, 2};
  for (const float special : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> x = random_floats(rng, 2 * 64, 1.0f, true);
    x[7] = special;
    const auto expected = run_moe(layer, routing, x, 2, kA4, false, CpuIsa::kReference, 1);
    for (CpuIsa isa : vector_isas()) {
      const auto y = run_moe(layer, routing, x, 2, kA4, false, isa, 1);
      for (size_t i = 0; i < y.size(); ++i) {
        if (std::isnan(expected[i]))
          EXPECT_TRUE(std::isnan(y[i])) << i;
        else
          EXPECT_EQ(y[i], expected[i]) << i;
      }
    }
  }
}

TEST(Moe, ResultOfATokenDependsOnNeitherBatchNorThreadsNorPacking) {
  std::mt19937 rng(5);
  constexpr int64_t kTokens = 700;  // several tasks of slots per expert, two ranges of tokens
  Layer layer = make_layer(rng, 4, 96, 80, 48, WeightFormat::kNvfp4, WeightFormat::kFp8Block);
  Layer packed = layer;
  pack(packed, best_cpu_isa());
  const Routing routing = random_routing(rng, kTokens, 2, 4);
  for (Precision precision : {kExact, kA16, kA4}) {
    const std::vector<float> x = random_floats(rng, kTokens * 96, 1.0f, !precision.exact);
    for (CpuIsa isa : vector_isas()) {
      std::vector<float> one_by_one;
      for (int64_t t = 0; t < kTokens; ++t) {
        const Routing own{{routing.idx.begin() + 2 * t, routing.idx.begin() + 2 * t + 2},
                          {routing.weights.begin() + 2 * t, routing.weights.begin() + 2 * t + 2},
                          2};
        const std::vector<float> row(x.begin() + t * 96, x.begin() + (t + 1) * 96);
        const auto y = run_moe(layer, own, row, 1, precision, true, isa, 1);
        one_by_one.insert(one_by_one.end(), y.begin(), y.end());
      }
      for (int threads : {1, 2, 4}) {
        const auto y = run_moe(packed, routing, x, kTokens, precision, true, isa, threads);
        ASSERT_EQ(0, std::memcmp(y.data(), one_by_one.data(), y.size() * 4)) << cpu_isa_name(isa) << " " << threads;
      }
    }
  }
}

TEST(Moe, UnusedSlotsGiveTheSharedExpertAloneOrZero) {
  std::mt19937 rng(6);
  Layer layer = make_layer(rng, 3, 64, 32, 32, WeightFormat::kNvfp4, WeightFormat::kBf16);
  const Routing none{{-1, -1}, {0.5f, 0.5f}, 2};
  const std::vector<float> x = random_floats(rng, 64, 1.0f, true);
  for (CpuIsa isa : vector_isas()) {
    for (float v : run_moe(layer, none, x, 1, kA16, false, isa, 1)) EXPECT_EQ(v, 0.0f);
    const auto with = run_moe(layer, none, x, 1, kA16, true, isa, 1);
    const auto expected = run_moe(layer, none, x, 1, kA16, true, CpuIsa::kReference, 1);
    EXPECT_LT(relative_error(with, expected), 0x1p-10);
  }
}

TEST(Moe, ZeroTokensIsLegalAndInvalidArgumentsAreRefused) {
  std::mt19937 rng(7);
  Layer layer = make_layer(rng, 3, 64, 32, 32, WeightFormat::kNvfp4, WeightFormat::kBf16);
  Layer dense = make_layer(rng, 3, 64, 32, 32, WeightFormat::kBf16, WeightFormat::kBf16);
  const std::vector<float> x = random_floats(rng, 64, 1.0f, true);
  for (CpuIsa isa : vector_isas()) {
    EXPECT_TRUE(run_moe(layer, {{}, {}, 2}, x, 0, kA16, true, isa, 1).empty());
    EXPECT_THROW(run_moe(layer, {{0, 3}, {1.0f, 1.0f}, 2}, x, 1, kA16, true, isa, 1), Error);
    EXPECT_THROW(run_moe(layer, {{0, -2}, {1.0f, 1.0f}, 2}, x, 1, kA16, true, isa, 1), Error);
    EXPECT_THROW(run_moe(dense, {{0, 2}, {1.0f, 1.0f}, 2}, x, 1, kA4, true, isa, 1), Error);
    Layer wrong = layer;
    wrong.experts[2].w2.view.rows = 48;
    EXPECT_THROW(run_moe(wrong, {{0, 2}, {1.0f, 1.0f}, 2}, x, 1, kA16, true, isa, 1), Error);
  }
}

TEST(MoeCost, CountsEachActivatedExpertOnce) {
  std::mt19937 rng(8);
  Layer layer = make_layer(rng, 4, 64, 32, 48, WeightFormat::kNvfp4, WeightFormat::kBf16);
  const Routing routing{{0, 2, 2, -1, 0, 2}, {1, 1, 1, 1, 1, 1}, 2};
  MoeArgs args{};
  args.topk_idx = routing.idx.data();
  args.experts = layer.experts.data();
  args.shared = &layer.shared;
  args.num_tokens = 3;
  args.hidden = 64;
  args.inter = 32;
  args.num_experts = 4;
  args.num_topk = 2;
  const OpCost cost = moe_cost(args);
  const double expert = 3 * (64 * 32 / 2 + 64 * 32 / 16 + 4), shared = 3 * 64 * 48 * 2;
  EXPECT_EQ(cost.bytes, 2 * expert + shared + 2 * 4 * 3 * 64);
  EXPECT_EQ(cost.flops, 2.0 * (5 * 3 * 64 * 32 + 3 * 3 * 64 * 48));
}

// Distance of silu(g) from g / (1 + e^-g) in units in the last place of the exact value.
double silu_error_ulp(float g) {
  const double exact = g / (1.0 + std::exp(-static_cast<double>(g)));
  return std::abs(silu(g) - exact) / std::ldexp(1.0, std::ilogb(exact) - 23);
}

TEST(Swiglu, SiluIsAccurateOnEveryBf16Gate) {
  double worst = 0.0, worst_far = 0.0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float g = decode_bf16({static_cast<uint16_t>(bits)});
    if (!(std::abs(g) <= 80.0f && std::abs(g) > 0x1p-120f)) continue;
    double& w = g < -32.0f ? worst_far : worst;
    w = std::max(w, silu_error_ulp(g));
  }
  EXPECT_LT(worst, 2.25);
  EXPECT_LT(worst_far, 5.1);
}

TEST(Swiglu, SiluIsAccurateOnBinary32Gates) {
  double worst = 0.0, worst_far = 0.0;
  for (float g = -80.0f; g <= 80.0f; g += 0.000931f) {
    double& w = g < -20.0f ? worst_far : worst;
    w = std::max(w, silu_error_ulp(g));
  }
  for (float g = 1e-30f; g < 20.0f; g *= 1.0003f) worst = std::max({worst, silu_error_ulp(g), silu_error_ulp(-g)});
  EXPECT_LT(worst, 3.5);
  EXPECT_LT(worst_far, 6.3);
}

TEST(Swiglu, GatesFarOutAreTheLimitOfSilu) {
  constexpr float kInf = INFINITY;
  EXPECT_EQ(swiglu(1e30f, 1.0f, 1.0f, kInf), 1e30f);
  EXPECT_EQ(swiglu(kInf, 1.0f, 1.0f, kInf), kInf);
  EXPECT_EQ(swiglu(-kInf, 1.0f, 1.0f, kInf), silu(-80.0f));
  EXPECT_NEAR(swiglu(-1e30f, 1.0f, 1.0f, kInf), 0.0, 1e-32);
  EXPECT_TRUE(std::signbit(swiglu(-0.0f, 1.0f, 1.0f, 10.0f)));
}

TEST(Swiglu, ClampsAndCheckValues) {
  EXPECT_NEAR(swiglu(12.0f, -11.0f, 1.0f, 10.0f), -99.99546, 2e-5);
  EXPECT_NEAR(swiglu(-30.0f, 20.0f, 1.0f, 10.0f), -2.8073e-11, 1e-15);
  EXPECT_NEAR(swiglu(2.0f, 3.0f, 1.0f, 10.0f), 5.2847825, 1e-6);
  EXPECT_NEAR(swiglu(2.0f, 3.0f, 0.5f, 10.0f), 0.5 * 5.2847825, 1e-6);
  EXPECT_TRUE(std::isnan(swiglu(NAN, 1.0f, 1.0f, 10.0f)));
  EXPECT_TRUE(std::isnan(swiglu(1.0f, NAN, 1.0f, 10.0f)));
}

}  // namespace
}  // namespace dsv4::test
