// e4m3 and ue4m3: every code decoded, every binary32 encoded.
#include "codec/e4m3.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "codec/oracle.h"

namespace dsv4 {
namespace {

static_assert(encode_e4m3(448.0f) == 0x7e && encode_e4m3(-1.0f) == 0xb8 && decode_e4m3(0x38) == 1.0f);
static_assert(encode_ue4m3(-0.0f) == 0 && decode_ue4m3(0x01) == 0x1p-9f);

TEST(E4m3, EveryCodeDecodesToItsValue) {
  const auto values = test::e4m3_values();
  for (int code = 0; code < 0x7f; ++code) {
    const auto positive = static_cast<uint8_t>(code);
    const auto negative = static_cast<uint8_t>(code | 0x80);
    EXPECT_EQ(decode_e4m3(positive), values[static_cast<size_t>(code)]) << code;
    EXPECT_EQ(decode_e4m3(negative), -values[static_cast<size_t>(code)]) << code;
    EXPECT_TRUE(std::signbit(decode_e4m3(negative)));
    EXPECT_EQ(decode_ue4m3(positive), values[static_cast<size_t>(code)]) << code;
    EXPECT_EQ(encode_e4m3(decode_e4m3(positive)), positive);
    EXPECT_EQ(encode_e4m3(decode_e4m3(negative)), negative);
  }
  EXPECT_EQ(values.back(), 448.0);
  EXPECT_TRUE(std::isnan(decode_e4m3(0x7f)));
  EXPECT_TRUE(std::isnan(decode_e4m3(0xff)));
}

TEST(E4m3, EveryBinary32EncodesToTheNearestWithTiesToEven) {
  EXPECT_EQ(test::count_mismatches(test::e4m3_values(), 0x80, 0x7f, [](float x) { return encode_e4m3(x); }), 0);
}

TEST(E4m3, SpecVectors) {
  EXPECT_EQ(decode_e4m3(encode_e4m3(464.0f)), 448.0f);
  EXPECT_EQ(decode_e4m3(encode_e4m3(1e9f)), 448.0f);
  EXPECT_EQ(decode_e4m3(encode_e4m3(-1e9f)), -448.0f);
  EXPECT_EQ(decode_e4m3(encode_e4m3(std::numeric_limits<float>::infinity())), 448.0f);
  EXPECT_EQ(encode_e4m3(0x1p-10f), 0);
  EXPECT_EQ(decode_e4m3(encode_e4m3(1.5f * 0x1p-10f)), 0x1p-9f);
  EXPECT_EQ(encode_e4m3(std::numeric_limits<float>::quiet_NaN()), 0x7f);
  EXPECT_EQ(encode_e4m3(-std::numeric_limits<float>::quiet_NaN()), 0x7f);
  EXPECT_EQ(encode_e4m3(-0.0f), 0x80);
  EXPECT_EQ(encode_e4m3(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(Ue4m3, NeverHasASign) {
  EXPECT_EQ(encode_ue4m3(-0.0f), 0);
  for (int code = 0; code < 0x7f; ++code) EXPECT_EQ(encode_ue4m3(decode_ue4m3(static_cast<uint8_t>(code))), code);
}

}  // namespace
}  // namespace dsv4
