// MXFP4: decoding, and its re-expression as NVFP4 without loss.
#include "codec/mxfp4.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace dsv4 {
namespace {

static_assert(decode_mxfp4(0x7, 127) == 6.0f);
static_assert(ue4m3_power_of_two(0) == 0x38 && ue4m3_power_of_two(-9) == 0x01);
static_assert(mxfp4_to_nvfp4_global(135).value == 1.0f);

TEST(Mxfp4, PowersOfTwoOfUe4m3) {
  for (int exponent = -9; exponent <= 8; ++exponent)
    EXPECT_EQ(decode_ue4m3(ue4m3_power_of_two(exponent)), std::ldexp(1.0, exponent)) << exponent;
}

TEST(Mxfp4, GlobalIsTwoToKMaxMinusEightForEveryByte) {
  for (int byte = 0; byte < 255; ++byte)
    EXPECT_EQ(mxfp4_to_nvfp4_global(static_cast<uint8_t>(byte)).value, std::ldexp(1.0, byte - 127 - 8)) << byte;
}

TEST(Mxfp4, ZeroGroupsAreThoseOfBothSignsOfZero) {
  uint8_t codes[16] = {};
  EXPECT_TRUE(mxfp4_group_is_zero(codes));
  for (uint8_t& byte : codes) byte = 0x88;
  EXPECT_TRUE(mxfp4_group_is_zero(codes));
  for (int position = 0; position < 32; ++position) {
    uint8_t one[16] = {};
    one[position / 2] = static_cast<uint8_t>(position % 2 == 0 ? 0x01 : 0x10);
    EXPECT_FALSE(mxfp4_group_is_zero(one)) << position;
  }
}

// Every code, every spread the window allows, every largest byte: the decoded numbers are the same bits.
TEST(Mxfp4, CastToNvfp4IsExactWithinTheWindow) {
  for (int max_byte = kMxfp4MaxExponentSpread; max_byte < 255; ++max_byte) {
    const GlobalScale global = mxfp4_to_nvfp4_global(static_cast<uint8_t>(max_byte));
    for (int spread = 0; spread <= kMxfp4MaxExponentSpread; ++spread) {
      const auto byte = static_cast<uint8_t>(max_byte - spread);
      const uint8_t sf = ue4m3_power_of_two(8 - spread);
      for (int code = 0; code < 16; ++code) {
        const float expected = decode_mxfp4(static_cast<uint8_t>(code), byte);
        const float found = decode_nvfp4(static_cast<uint8_t>(code), sf, global);
        ASSERT_EQ(detail::float_bits(found), detail::float_bits(expected)) << max_byte << " " << spread << " " << code;
      }
    }
  }
}

TEST(Mxfp4, WindowEndsWhereUe4m3Ends) {
  // One binade more would need 2^-10, which rounds to zero.
  EXPECT_EQ(8 - kMxfp4MaxExponentSpread, -9);
  EXPECT_EQ(encode_ue4m3(0x1p-10f), 0);
}

}  // namespace
}  // namespace dsv4
