// e2m1: every code decoded, every binary32 encoded, the packing order.
#include "codec/e2m1.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "codec/oracle.h"

namespace dsv4 {
namespace {

// Usable in constant expressions.
static_assert(encode_e2m1(2.5f) == 4 && encode_e2m1(-6.0f) == 0xf && decode_e2m1(0xd) == -3.0f);
static_assert(pack_e2m1x2(0x1, 0xf) == 0xf1);

TEST(E2m1, EveryCodeDecodesToItsTableValue) {
  const auto values = test::e2m1_values();
  for (int code = 0; code < 16; ++code) {
    const double expected = (code & 8 ? -1 : 1) * values[static_cast<size_t>(code & 7)];
    EXPECT_EQ(decode_e2m1(static_cast<uint8_t>(code)), expected) << code;
    EXPECT_EQ(std::signbit(decode_e2m1(static_cast<uint8_t>(code))), (code & 8) != 0) << code;
    EXPECT_EQ(decode_e2m1_doubled(static_cast<uint8_t>(code)), 2 * expected) << code;
    EXPECT_EQ(encode_e2m1(decode_e2m1(static_cast<uint8_t>(code))), code);
  }
}

TEST(E2m1, EveryBinary32EncodesToTheNearestWithTiesToEven) {
  EXPECT_EQ(test::count_mismatches(test::e2m1_values(), 0x8, 0x7, [](float x) { return encode_e2m1(x); }), 0);
}

TEST(E2m1, InputsThatRoundTwiceWrongly) {
  // Rounding to half steps first gives 2, 4, 4 here.
  EXPECT_EQ(decode_e2m1(encode_e2m1(2.70f)), 3.0f);
  EXPECT_EQ(decode_e2m1(encode_e2m1(3.30f)), 3.0f);
  EXPECT_EQ(decode_e2m1(encode_e2m1(5.2f)), 6.0f);
}

TEST(E2m1, SpecVectors) {
  EXPECT_EQ(decode_e2m1(encode_e2m1(2.5000002f)), 3.0f);
  EXPECT_EQ(decode_e2m1(encode_e2m1(2.5f)), 2.0f);
  EXPECT_EQ(encode_e2m1(-0.25f), 0x8);
  EXPECT_EQ(decode_e2m1(encode_e2m1(7.0f)), 6.0f);
  EXPECT_EQ(decode_e2m1(encode_e2m1(std::numeric_limits<float>::infinity())), 6.0f);
  EXPECT_EQ(decode_e2m1(encode_e2m1(-std::numeric_limits<float>::infinity())), -6.0f);
  EXPECT_EQ(encode_e2m1(std::numeric_limits<float>::quiet_NaN()), 0x7);
  EXPECT_EQ(encode_e2m1(-std::numeric_limits<float>::quiet_NaN()), 0x7);
  const float ties[][2] = {{.25f, 0}, {.75f, 1}, {1.25f, 1}, {1.75f, 2}, {2.5f, 2}, {3.5f, 4}, {5.0f, 4}};
  for (const auto& [x, expected] : ties) EXPECT_EQ(decode_e2m1(encode_e2m1(x)), expected) << x;
}

TEST(E2m1, EvenElementIsTheLowNibble) {
  for (int even = 0; even < 16; ++even)
    for (int odd = 0; odd < 16; ++odd) {
      const uint8_t byte = pack_e2m1x2(static_cast<uint8_t>(even), static_cast<uint8_t>(odd));
      EXPECT_EQ(byte, even + 16 * odd);
      EXPECT_EQ(e2m1x2_even(byte), even);
      EXPECT_EQ(e2m1x2_odd(byte), odd);
    }
}

}  // namespace
}  // namespace dsv4
