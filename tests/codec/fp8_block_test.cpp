// ue8m0 and the two simulated quantisers: scales against the table of the specification (3.4), round trips, saturation.
#include "codec/fp8_block.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace dsv4 {
namespace {

static_assert(fp8_block_scale(448.0f) == 127 && fp4_block_scale(6.0f) == 127);
static_assert(decode_ue8m0(127) == 1.0f && ceil_log2(1.5f) == 1);

TEST(Ue8m0, EveryByteIsItsPowerOfTwo) {
  for (int byte = 0; byte < 255; ++byte)
    EXPECT_EQ(decode_ue8m0(static_cast<uint8_t>(byte)), std::ldexp(1.0, byte - 127)) << byte;
  EXPECT_TRUE(std::isnan(decode_ue8m0(255)));
}

TEST(Ue8m0, CeilLog2IsExactAtPowersOfTwoAndTheirNeighbours) {
  for (int exponent = -126; exponent <= 127; ++exponent) {
    const float power = std::ldexp(1.0f, exponent);
    EXPECT_EQ(ceil_log2(power), exponent);
    EXPECT_EQ(ceil_log2(std::nextafter(power, std::numeric_limits<float>::infinity())), exponent + 1);
    if (exponent > -126) {
      EXPECT_EQ(ceil_log2(std::nextafter(power, 0.0f)), exponent);
    }
  }
}

TEST(Fp8Block, ScalesOfTheSpecificationTable) {
  const struct {
    float amax;
    int exponent;
  } cases[] = {{0, -22}, {0.001f, -18}, {1, -8}, {3.5f, -7}, {224, -1}, {225, 0}, {448, 0}, {449, 1}, {896, 1}};
  for (const auto& [amax, exponent] : cases) EXPECT_EQ(fp8_block_scale(amax) - 127, exponent) << amax;
}

TEST(Fp4Block, ScalesOfTheSpecificationTable) {
  const struct {
    float amax;
    int exponent;
  } cases[] = {{0, -126}, {0.001f, -12}, {1, -2}, {3, -1}, {6, 0}, {6.1f, 1}, {12, 1}};
  for (const auto& [amax, exponent] : cases) EXPECT_EQ(fp4_block_scale(amax) - 127, exponent) << amax;
}

// The scale is the smallest power of two for which the largest element still fits, except that amax times the rounded
// constant 1/448 (1/6) may land on or just past a power.
TEST(Fp8Block, LargestElementFitsAndTheScaleIsNotWasteful) {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> exponent(-12, 30);
  for (int i = 0; i < 100000; ++i) {
    const float amax = std::exp2(exponent(random));
    const float quotient = amax / decode_ue8m0(fp8_block_scale(amax));
    ASSERT_LE(quotient, 448.0f * (1 + 0x1p-22f)) << amax;
    ASSERT_GT(quotient, 224.0f * (1 - 0x1p-22f)) << amax;
    const float quotient4 = amax / decode_ue8m0(fp4_block_scale(amax));
    ASSERT_LE(quotient4, 6.0f * (1 + 0x1p-22f)) << amax;
    ASSERT_GT(quotient4, 3.0f * (1 - 0x1p-22f)) << amax;
  }
}

TEST(Fp8Block, RoundTripIsExactForWhatTheCodesHold) {
  for (int scale = 100; scale < 150; ++scale)
    for (int code = 0; code < 256; ++code) {
      if ((code & 0x7f) == 0x7f) continue;
      const auto s = static_cast<uint8_t>(scale);
      const float x = decode_fp8_block_element(static_cast<uint8_t>(code), s);
      ASSERT_EQ(encode_fp8_block_element(x, s), code);
      ASSERT_EQ(round_bf16(x), x);
    }
  for (int scale = 1; scale < 250; ++scale)
    for (int code = 0; code < 16; ++code) {
      const auto s = static_cast<uint8_t>(scale);
      const float x = decode_fp4_block_element(static_cast<uint8_t>(code), s);
      ASSERT_EQ(encode_fp4_block_element(x, s), code);
      ASSERT_EQ(round_bf16(x), x);
    }
}

TEST(Fp8Block, ElementsBeyondTheScaleSaturate) {
  EXPECT_EQ(decode_fp8_block_element(encode_fp8_block_element(1000.0f, 127), 127), 448.0f);
  EXPECT_EQ(decode_fp8_block_element(encode_fp8_block_element(-1000.0f, 127), 127), -448.0f);
  EXPECT_EQ(decode_fp4_block_element(encode_fp4_block_element(-7.0f, 127), 127), -6.0f);
}

TEST(Fp8Block, NanAmaxIsTheFloorAndInfiniteAmaxIsNan) {
  EXPECT_EQ(fp8_block_scale(std::numeric_limits<float>::quiet_NaN()), fp8_block_scale(0.0f));
  EXPECT_EQ(fp8_block_scale(std::numeric_limits<float>::infinity()), 0xff);
  EXPECT_EQ(fp4_block_scale(std::numeric_limits<float>::infinity()), 0xff);
}

}  // namespace
}  // namespace dsv4
