// The three scale rules: bytes of modelopt against the codec, errors of the others against modelopt and exhaustive search.
#include "checkpoint/quantize/group_rules.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "codec/bf16.h"

namespace dsv4 {
namespace {

// Normal weights whose size varies by group over `binades`, some zeros of both signs, some all-zero groups.
std::vector<float> random_weights(int64_t num_groups, float size, int binades, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> w;
  for (int64_t g = 0; g < num_groups; ++g) {
    const float scale = std::ldexp(size, -static_cast<int>(random() % static_cast<uint32_t>(binades + 1)));
    const bool zero = random() % 50 == 0;
    for (int i = 0; i < 16; ++i) {
      float x = zero ? 0.0f : round_bf16(normal(random) * scale);
      if (random() % 40 == 0) x = random() % 2 == 0 ? 0.0f : -0.0f;
      w.push_back(x);
    }
  }
  return w;
}

struct Encoded {
  GlobalScale global;
  std::vector<uint8_t> codes, sf;
  GroupLoss loss;

  double group_error(const std::vector<float>& w, int64_t g) const {
    float out[16];
    decode_nvfp4_group(codes.data() + 8 * g, sf[static_cast<size_t>(g)], global, out);
    double error = 0;
    for (int i = 0; i < 16; ++i) {
      const double d = static_cast<double>(w[static_cast<size_t>(16 * g + i)]) - out[i];
      error += d * d;
    }
    return error;
  }
};

Encoded encode(const std::vector<float>& w, ScaleRule rule) {
  const auto num_groups = static_cast<int64_t>(w.size()) / 16;
  Encoded e;
  e.global = rule_global_scale(group_amax_range(w.data(), num_groups), rule);
  e.codes.resize(w.size() / 2);
  e.sf.resize(w.size() / 16);
  e.loss = encode_groups(w.data(), num_groups, e.global, rule, e.codes.data(), e.sf.data());
  return e;
}

constexpr int64_t kGroups = 20000;

TEST(GroupRules, ModelOptBytesEqualTheCodecsWeightRule) {
  uint32_t seed = 0;
  for (const float size : {1.0f, 0.02f, 1e-30f, 1e30f, 0x1p-126f, 3e-39f})
    for (const int binades : {0, 4, 25}) {
      const auto w = random_weights(kGroups, size, binades, ++seed);
      const Encoded e = encode(w, ScaleRule::kModelOpt);
      EXPECT_EQ(e.global.value, nvfp4_global_scale(group_amax(w.data(), static_cast<int>(w.size()))).value);
      for (int64_t g = 0; g < kGroups; ++g) {
        const Nvfp4Group expected = encode_nvfp4_weight_group(w.data() + 16 * g, e.global);
        ASSERT_EQ(e.sf[static_cast<size_t>(g)], expected.sf) << size << " " << binades << " " << g;
        ASSERT_EQ(std::memcmp(e.codes.data() + 8 * g, expected.codes, 8), 0) << size << " " << binades << " " << g;
      }
    }
}

TEST(GroupRules, ReportedErrorIsTheErrorOfTheDecodedWeights) {
  for (const float size : {0.02f, 1e-25f, 1e25f})
    for (const ScaleRule rule : {ScaleRule::kModelOpt, ScaleRule::kMse, ScaleRule::kFourOverSix}) {
      const auto w = random_weights(kGroups, size, 6, 7);
      const Encoded e = encode(w, rule);
      double error = 0, norm = 0;
      for (int64_t g = 0; g < kGroups; ++g) error += e.group_error(w, g);
      for (float x : w) norm += static_cast<double>(x) * x;
      EXPECT_NEAR(e.loss.error_sq / error, 1.0, 1e-5);
      EXPECT_NEAR(e.loss.norm_sq / norm, 1.0, 1e-5);
    }
}

TEST(GroupRules, NoGroupIsWorseThanModelOptAndTheSumIsBetter) {
  for (const int binades : {0, 3, 8, 20})
    for (const ScaleRule rule : {ScaleRule::kMse, ScaleRule::kFourOverSix}) {
      const auto w = random_weights(kGroups, 0.05f, binades, 21);
      const Encoded base = encode(w, ScaleRule::kModelOpt);
      const Encoded e = encode(w, rule);
      for (int64_t g = 0; g < kGroups; ++g)
        ASSERT_LE(e.group_error(w, g), base.group_error(w, g)) << binades << " " << g;
      EXPECT_LT(e.loss.error_sq, 0.9 * base.loss.error_sq) << binades;
    }
}

TEST(GroupRules, MseIsNoWorseThanFourOverSix) {
  const auto w = random_weights(kGroups, 0.05f, 6, 22);
  EXPECT_LT(encode(w, ScaleRule::kMse).loss.error_sq, encode(w, ScaleRule::kFourOverSix).loss.error_sq);
}

// The window of candidates is wide enough: trying every ue4m3 code finds almost nothing more.
TEST(GroupRules, MseFindsTheBestOfAllScaleCodes) {
  constexpr int64_t kFew = 1500;
  const auto w = random_weights(kFew, 0.05f, 6, 23);
  const Encoded e = encode(w, ScaleRule::kMse);
  double found = 0, best_of_all = 0;
  for (int64_t g = 0; g < kFew; ++g) {
    double best = std::numeric_limits<double>::infinity();
    for (int sf = 1; sf <= 0x7e; ++sf) {
      const float divisor = decode_ue4m3(static_cast<uint8_t>(sf)) * e.global.value;
      double error = 0;
      for (int i = 0; i < 16; ++i) {
        const float x = w[static_cast<size_t>(16 * g + i)];
        const double d =
            static_cast<double>(x) - decode_nvfp4(encode_e2m1(x / divisor), static_cast<uint8_t>(sf), e.global);
        error += d * d;
      }
      best = std::min(best, error);
    }
    ASSERT_LE(best, e.group_error(w, g) * (1 + 1e-9));
    found += e.group_error(w, g);
    best_of_all += best;
  }
  EXPECT_LT(found, best_of_all * 1.0005);
}

TEST(GroupRules, FourOverSixPutsAmaxOnSixOrOnFour) {
  const auto w = random_weights(kGroups, 0.05f, 3, 24);
  const Encoded e = encode(w, ScaleRule::kFourOverSix);
  int64_t on_four = 0;
  for (int64_t g = 0; g < kGroups; ++g) {
    const float amax = group_amax(w.data() + 16 * g, 16);
    const uint8_t six = nvfp4_weight_sf(amax, e.global);
    const uint8_t four = encode_ue4m3(amax / (4.0f * e.global.value));
    const uint8_t sf = e.sf[static_cast<size_t>(g)];
    ASSERT_TRUE(sf == six || sf == four) << g;
    on_four += sf != six;
  }
  EXPECT_GT(on_four, kGroups / 10);
  EXPECT_LT(on_four, kGroups * 9 / 10);
}

TEST(GroupRules, GlobalIsDoubledOnlyWhileHalvedScalesStayExact) {
  const GlobalScale base = nvfp4_global_scale(1.0f);
  EXPECT_EQ(rule_global_scale({1.0f, 0.01f}, ScaleRule::kModelOpt).value, base.value);
  EXPECT_EQ(rule_global_scale({1.0f, 0.01f}, ScaleRule::kMse).value, 2 * base.value);
  EXPECT_EQ(rule_global_scale({1.0f, 0.01f}, ScaleRule::kFourOverSix).value, 2 * base.value);
  EXPECT_EQ(rule_global_scale({1.0f, 1e-5f}, ScaleRule::kMse).value, base.value);
  EXPECT_EQ(rule_global_scale({}, ScaleRule::kMse).value, 1.0f);
}

TEST(GroupRules, CountsZeroedAndSaturatedGroups) {
  std::vector<float> w(48, 0.0f);
  w[0] = 1.0f;    // sets the global scale
  w[17] = 1e-9f;  // far below the smallest scale: vanishes
  Encoded e = encode(w, ScaleRule::kModelOpt);
  EXPECT_EQ(e.loss.num_zeroed, 1);  // the third group was zero before
  EXPECT_EQ(e.loss.num_saturated, 0);
  // A global scale that is too small clips.
  e.loss = encode_groups(w.data(), 3, {1e-5f}, ScaleRule::kModelOpt, e.codes.data(), e.sf.data());
  EXPECT_EQ(e.loss.num_saturated, 1);
}

}  // namespace
}  // namespace dsv4
