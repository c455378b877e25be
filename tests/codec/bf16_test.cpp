// bf16: every pattern decoded and encoded back, and the inputs around every rounding boundary.
#include "codec/bf16.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

namespace dsv4 {
namespace {

static_assert(encode_bf16(1.0f).bits == 0x3f80 && decode_bf16({0xc000}) == -2.0f);

TEST(Bf16, EveryPatternSurvivesARoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const bf16 x{static_cast<uint16_t>(bits)};
    const float value = decode_bf16(x);
    EXPECT_EQ(std::bit_cast<uint32_t>(value), bits << 16);
    if (std::isnan(value)) {
      EXPECT_EQ(encode_bf16(value).bits, bits | 0x40) << bits;  // quiet
    } else {
      EXPECT_EQ(encode_bf16(value).bits, bits) << bits;
    }
  }
}

TEST(Bf16, RoundsToNearestWithTiesToEvenBesideEveryBoundary) {
  // Magnitudes: every value, the midpoint to the next one, and the neighbours of both. After the largest finite value the
  // next one would be 2^128, which rounds to infinity.
  for (uint32_t low = 0; low < 0x7f80; ++low) {
    const uint32_t even = low % 2 == 0 ? low : low + 1;
    const uint32_t base = low << 16;
    const struct {
      uint32_t input, expected;
    } cases[] = {{base, low},           {base + 1, low},          {base + 0x7fff, low},
                 {base + 0x8000, even}, {base + 0x8001, low + 1}, {base + 0xffff, low + 1}};
    for (const auto& [input, expected] : cases) {
      ASSERT_EQ(encode_bf16(std::bit_cast<float>(input)).bits, expected) << std::hex << input;
      ASSERT_EQ(encode_bf16(std::bit_cast<float>(input | 0x80000000u)).bits, expected | 0x8000u) << std::hex << input;
    }
  }
}

TEST(Bf16, InfinityAndNanStayWhatTheyAre) {
  EXPECT_EQ(encode_bf16(std::numeric_limits<float>::infinity()).bits, 0x7f80);
  EXPECT_EQ(encode_bf16(-std::numeric_limits<float>::infinity()).bits, 0xff80);
  EXPECT_EQ(encode_bf16(std::numeric_limits<float>::max()).bits, 0x7f80);
  // A payload in the lower half only: truncation would make it infinity.
  EXPECT_TRUE(std::isnan(decode_bf16(encode_bf16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_TRUE(std::isnan(decode_bf16(encode_bf16(std::bit_cast<float>(0xffffffffu)))));
}

}  // namespace
}  // namespace dsv4
