// Scale-factor layouts: golden offsets, one place per factor, padding.
#include "codec/sf_layout.h"

#include <gtest/gtest.h>

#include <vector>

namespace dsv4 {
namespace {

static_assert(sf_offset_128x4(33, 5, 8) == 512 + 16 + 4 + 1);

TEST(SfLayout, GoldenOffsets) {
  EXPECT_EQ(sf_offset_linear(3, 5, 16), 53);
  const struct {
    int64_t row, group, num_groups, offset;
  } cases[] = {{0, 0, 8, 0},      {0, 1, 8, 1},
               {0, 3, 8, 3},      {0, 4, 8, 512},
               {1, 0, 8, 16},     {31, 0, 8, 496},
               {32, 0, 8, 4},     {64, 0, 8, 8},
               {96, 0, 8, 12},    {127, 3, 8, 511},
               {127, 7, 8, 1023}, {128, 0, 8, 1024},
               {129, 2, 8, 1042}, {300, 6, 8, 2 * 1024 + 512 + 12 * 16 + 4 + 2},
               {128, 0, 5, 1024}};  // 5 groups are padded to 8
  for (const auto& [row, group, num_groups, offset] : cases)
    EXPECT_EQ(sf_offset_128x4(row, group, num_groups), offset) << row << " " << group << " " << num_groups;
}

TEST(SfLayout, EveryFactorHasItsOwnPlaceInsideTheTensor) {
  const struct {
    int64_t rows, num_groups;
  } shapes[] = {{1, 1}, {128, 4}, {127, 3}, {129, 5}, {256, 16}, {300, 7}, {512, 32}};
  for (const auto& [rows, num_groups] : shapes)
    for (const SfLayout layout : {SfLayout::kLinear, SfLayout::k128x4}) {
      std::vector<int> uses(static_cast<size_t>(sf_bytes(layout, rows, num_groups)));
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t group = 0; group < num_groups; ++group) {
          const int64_t offset = sf_offset(layout, row, group, num_groups);
          ASSERT_GE(offset, 0);
          ASSERT_LT(offset, static_cast<int64_t>(uses.size()));
          ASSERT_EQ(uses[static_cast<size_t>(offset)]++, 0) << row << " " << group;
        }
    }
}

TEST(SfLayout, SizesArePaddedTo128RowsAnd4Groups) {
  EXPECT_EQ(sf_bytes(SfLayout::kLinear, 129, 5), 645);
  EXPECT_EQ(sf_bytes(SfLayout::k128x4, 129, 5), 256 * 8);
  EXPECT_EQ(sf_bytes(SfLayout::k128x4, 128, 4), 512);
  EXPECT_EQ(sf_bytes(SfLayout::k128x4, 0, 4), 0);
}

}  // namespace
}  // namespace dsv4
