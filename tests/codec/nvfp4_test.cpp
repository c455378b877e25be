// NVFP4: golden bytes, the weight rule and the run-time rule against step-by-step references, decoding, edge cases.
#include "codec/nvfp4.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>

#include "codec/oracle.h"

namespace dsv4 {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Row = std::array<float, 16>;

constexpr Row kChannels{0, -0.0f, .5f, -.5f, 1, -1, 1.5f, -1.5f, 2, -2, 3, -3, 4, -4, 6, -6};

constexpr bool constexpr_works() {
  const Nvfp4Group group = encode_nvfp4_weight_group(kChannels.data(), {1.0f});
  const Nvfp4Group fast = encode_nvfp4_runtime_group(kChannels.data(), {1.0f}, nvfp4_rcp6({1.0f}));
  float out[16]{};
  decode_nvfp4_group(fast.codes, fast.sf, {1.0f}, out);
  return group.sf == 0x38 && fast.sf == 0x38 && out[15] == -6.0f;
}
static_assert(constexpr_works());

std::array<int, 8> codes_of(const Nvfp4Group& group) {
  std::array<int, 8> codes{};
  for (size_t j = 0; j < 8; ++j) codes[j] = group.codes[j];
  return codes;
}

// The rules again, in the words of the specification, every operation stored to binary32 and encoding by table.
struct Reference {
  std::vector<double> e2m1 = test::e2m1_values();
  std::vector<double> e4m3 = test::e4m3_values();

  uint8_t nearest_e4m3(float x) const { return test::nearest_code(e4m3, x); }
  uint8_t nearest_e2m1(float x) const {
    return static_cast<uint8_t>(test::nearest_code(e2m1, std::fabs(static_cast<double>(x))) |
                                (std::signbit(x) ? 8 : 0));
  }

  Nvfp4Group weight(const Row& w, float g) const {
    float amax = 0;
    for (float x : w) amax = std::max(amax, std::fabs(x));
    Nvfp4Group group{};
    const volatile float six_g = 6.0f * g;
    const volatile float ratio = amax / six_g;
    group.sf = amax == 0 ? 0x38 : nearest_e4m3(ratio < 0x1p-9f ? 0x1p-9f : ratio);
    const volatile float divisor = static_cast<float>(e4m3[group.sf]) * g;
    for (size_t i = 0; i < 16; ++i) {
      const volatile float q = w[i] / divisor;
      const uint8_t code = w[i] == 0.0f ? 0 : nearest_e2m1(q);
      group.codes[i / 2] = static_cast<uint8_t>(group.codes[i / 2] | (i % 2 == 0 ? code : code << 4));
    }
    return group;
  }

  Nvfp4Group runtime(const Row& x, float g) const {
    float amax = 0;
    for (float v : x) amax = std::max(amax, std::fabs(v));
    Nvfp4Group group{};
    const volatile float six_g = 6.0f * g;
    const volatile float r6 = 1.0f / six_g;
    const volatile float ratio = amax * r6;
    group.sf = nearest_e4m3(ratio);
    const volatile float product = static_cast<float>(e4m3[group.sf]) * g;
    const volatile float rs = group.sf == 0 ? 0.0f : 1.0f / product;
    for (size_t i = 0; i < 16; ++i) {
      const volatile float q = x[i] * rs;
      const uint8_t code = nearest_e2m1(q);
      group.codes[i / 2] = static_cast<uint8_t>(group.codes[i / 2] | (i % 2 == 0 ? code : code << 4));
    }
    return group;
  }
};

Row random_row(std::mt19937& random, float spread) {
  std::normal_distribution<float> normal(0, 1);
  std::uniform_real_distribution<float> exponent(-spread, spread);
  Row row;
  const float size = std::exp2(exponent(random));
  for (float& x : row) x = round_bf16(normal(random) * size);
  if (random() % 8 == 0) row[random() % 16] = random() % 2 == 0 ? 0.0f : -0.0f;
  if (random() % 16 == 0) row.fill(0.0f);
  return row;
}

TEST(Nvfp4, GoldenBytesOfTheSpecification) {
  // The run-time rule keeps the sign of -0; the weight rule gives it code 0.
  const Nvfp4Group group = encode_nvfp4_runtime_group(kChannels.data(), {1.0f}, nvfp4_rcp6({1.0f}));
  EXPECT_EQ(codes_of(group), (std::array<int, 8>{0x80, 0x91, 0xa2, 0xb3, 0xc4, 0xd5, 0xe6, 0xf7}));
  EXPECT_EQ(group.sf, 0x38);
  const Nvfp4Group weights = encode_nvfp4_weight_group(kChannels.data(), {1.0f});
  EXPECT_EQ(codes_of(weights), (std::array<int, 8>{0x00, 0x91, 0xa2, 0xb3, 0xc4, 0xd5, 0xe6, 0xf7}));
  EXPECT_EQ(weights.sf, 0x38);
  float out[16];
  decode_nvfp4_group(group.codes, group.sf, {1.0f}, out);
  for (size_t i = 0; i < 16; ++i) {
    EXPECT_EQ(out[i], kChannels[i]);
    EXPECT_EQ(std::signbit(out[i]), std::signbit(kChannels[i]));
  }
}

TEST(Nvfp4, GlobalScaleIsAmaxOver2688AndOneForZeros) {
  EXPECT_EQ(nvfp4_global_scale(2688.0f).value, 1.0f);
  EXPECT_EQ(nvfp4_global_scale(0.0f).value, 1.0f);
  EXPECT_EQ(nvfp4_global_scale(1.0f).value, 1.0f / 2688.0f);
  EXPECT_EQ(rcp(rcp(GlobalScale{0.25f})).value, 0.25f);
}

TEST(Nvfp4WeightRule, TiesInElements) {
  // amax 6 and g = 1: sf = 1, so the elements are the quotients.
  Row w{6, .25f, .75f, 1.25f, 1.75f, 2.5f, 3.5f, 5, -.25f, -.75f, -1.25f, -1.75f, -2.5f, -3.5f, -5, -0.0f};
  const Nvfp4Group group = encode_nvfp4_weight_group(w.data(), {1.0f});
  EXPECT_EQ(group.sf, 0x38);
  EXPECT_EQ(codes_of(group), (std::array<int, 8>{0x07, 0x22, 0x44, 0x66, 0xa8, 0xca, 0xec, 0x0e}));
}

TEST(Nvfp4WeightRule, TiesInTheScaleFactorGoToTheEvenCode) {
  Row w{};
  w[3] = 6.375f;  // sf 1.0625: between 1 (0x38) and 1.125 (0x39)
  EXPECT_EQ(encode_nvfp4_weight_group(w.data(), {1.0f}).sf, 0x38);
  w[3] = 7.125f;  // 1.1875: between 1.125 (0x39) and 1.25 (0x3a)
  EXPECT_EQ(encode_nvfp4_weight_group(w.data(), {1.0f}).sf, 0x3a);
}

TEST(Nvfp4WeightRule, ZeroGroupHasScaleOneAndPositiveZeros) {
  Row w{};
  w[5] = -0.0f;
  const Nvfp4Group group = encode_nvfp4_weight_group(w.data(), {0.01f});
  EXPECT_EQ(group.sf, 0x38);
  EXPECT_EQ(codes_of(group), (std::array<int, 8>{}));
}

TEST(Nvfp4WeightRule, TinyGroupsGetTheSmallestScaleNotZero) {
  Row w{};
  w[0] = 1e-6f;
  w[1] = -1e-6f;
  w[2] = 0x1p-9f;  // sf is 2^-9 all the same: 1 * 2^-9
  Nvfp4Group group = encode_nvfp4_weight_group(w.data(), {1.0f});
  EXPECT_EQ(group.sf, 0x01);
  EXPECT_EQ(codes_of(group), (std::array<int, 8>{0x80, 0x02, 0, 0, 0, 0, 0, 0}));  // a small negative keeps its sign
  w[2] = 0;
  group = encode_nvfp4_weight_group(w.data(), {1.0f});
  EXPECT_EQ(group.sf, 0x01);
}

TEST(Nvfp4WeightRule, LargestGroupOfATensorUsesTheWholeRange) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> size(-60, 60);
  for (int i = 0; i < 10000; ++i) {
    Row w{};
    w[7] = round_bf16(std::exp2(size(random)));
    const GlobalScale global = nvfp4_global_scale(w[7]);
    const Nvfp4Group group = encode_nvfp4_weight_group(w.data(), global);
    ASSERT_EQ(group.sf, 0x7e) << w[7];
    ASSERT_EQ(group.codes[3], 0x70) << w[7];
  }
}

TEST(Nvfp4WeightRule, EqualsTheReferenceOnRandomGroups) {
  const Reference reference;
  std::mt19937 random(1);
  for (int i = 0; i < 100000; ++i) {
    const Row w = random_row(random, 12);
    const GlobalScale global = nvfp4_global_scale(std::exp2(static_cast<float>(random() % 25)) * 0.83f);
    const Nvfp4Group expected = reference.weight(w, global.value);
    const Nvfp4Group found = encode_nvfp4_weight_group(w.data(), global);
    ASSERT_EQ(found.sf, expected.sf) << i;
    ASSERT_EQ(codes_of(found), codes_of(expected)) << i;
  }
}

TEST(Nvfp4RuntimeRule, EqualsTheReferenceOnRandomGroups) {
  const Reference reference;
  std::mt19937 random(2);
  int num_different = 0;
  for (int i = 0; i < 100000; ++i) {
    const Row x = random_row(random, 12);
    const GlobalScale global = nvfp4_global_scale(std::exp2(static_cast<float>(random() % 25)) * 0.83f);
    const Nvfp4Group expected = reference.runtime(x, global.value);
    const Nvfp4Group found = encode_nvfp4_runtime_group(x.data(), global, nvfp4_rcp6(global));
    ASSERT_EQ(found.sf, expected.sf) << i;
    ASSERT_EQ(codes_of(found), codes_of(expected)) << i;
    num_different += codes_of(found) != codes_of(encode_nvfp4_weight_group(x.data(), global));
  }
  EXPECT_GT(num_different, 0) << "reciprocals and divisions never differed: the two rules would be one";
}

TEST(Nvfp4RuntimeRule, ScaleMayBeZeroAndThenEverythingIsZero) {
  Row x{};
  x[0] = 6 * 0x1p-10f;  // amax / 6 = 2^-10: ties to zero
  x[1] = -x[0];
  Nvfp4Group group = encode_nvfp4_runtime_group(x.data(), {1.0f}, nvfp4_rcp6({1.0f}));
  EXPECT_EQ(group.sf, 0);
  EXPECT_EQ(codes_of(group), (std::array<int, 8>{0x80}));
  x[0] = 6 * 0x1.1p-10f;
  group = encode_nvfp4_runtime_group(x.data(), {1.0f}, nvfp4_rcp6({1.0f}));
  EXPECT_EQ(group.sf, 1);
}

TEST(Nvfp4RuntimeRule, ScaleSaturatesAt448) {
  Row x{};
  x[0] = 1e6f;
  x[1] = 1344;
  const Nvfp4Group group = encode_nvfp4_runtime_group(x.data(), {1.0f}, nvfp4_rcp6({1.0f}));
  EXPECT_EQ(group.sf, 0x7e);
  EXPECT_EQ(group.codes[0], 0x57);  // 6 * 448 and 3 * 448
}

TEST(Nvfp4RuntimeRule, NanIsIgnoredByTheScaleAndEncodedAsSix) {
  Row x{};
  x[0] = kNan;
  x[1] = 6;
  const Nvfp4Group group = encode_nvfp4_runtime_group(x.data(), {1.0f}, nvfp4_rcp6({1.0f}));
  EXPECT_EQ(group.sf, 0x38);
  EXPECT_EQ(group.codes[0], 0x77);
}

TEST(Nvfp4RuntimeRule, InfinityIsTheLargestCodeUnderAFiniteGlobalAndNanUnderItsOwn) {
  Row x{};
  x[0] = -kInfinity;
  x[1] = 448;
  Nvfp4Group group = encode_nvfp4_runtime_group(x.data(), {1.0f}, nvfp4_rcp6({1.0f}));
  EXPECT_EQ(group.sf, 0x7e);
  EXPECT_EQ(group.codes[0], 0x2f);
  const GlobalScale own = nvfp4_global_scale(kInfinity);
  group = encode_nvfp4_runtime_group(x.data(), own, nvfp4_rcp6(own));
  EXPECT_EQ(group.sf, 0x7f);
  EXPECT_TRUE(std::isnan(decode_nvfp4(group.codes[0] & 0xf, group.sf, own)));
}

TEST(Nvfp4, ProductOfCodeAndScaleIsExactInBf16) {
  for (int code = 0; code < 16; ++code)
    for (int sf = 0; sf < 0x7f; ++sf) {
      const float product = decode_nvfp4(static_cast<uint8_t>(code), static_cast<uint8_t>(sf), {1.0f});
      const double exact =
          static_cast<double>(decode_e2m1(static_cast<uint8_t>(code))) * decode_ue4m3(static_cast<uint8_t>(sf));
      ASSERT_EQ(product, exact);
      ASSERT_EQ(round_bf16(product), exact);
      ASSERT_LE(std::fabs(exact), 2688.0);  // fits FP16 too: at most 6 significant bits, at least 2^-10
    }
}

}  // namespace
}  // namespace dsv4
