// Where the scale factor of (row m, group g = k/16) lives.
//
//   linear: [rows, K/16] row-major, what checkpoints hold.
//   128x4:  what tcgen05 block-scaled MMA reads: tiles of 128 rows x 4 groups, 512 bytes each;
//           rows padded to 128, groups to 4, padding zero.
#pragma once

#include <cstdint>

#include "codec/host_device.h"

namespace dsv4 {

enum class SfLayout : uint8_t { kLinear, k128x4 };

DSV4_HD constexpr int64_t sf_offset_linear(int64_t row, int64_t group, int64_t num_groups) {
  return row * num_groups + group;
}

DSV4_HD constexpr int64_t sf_offset_128x4(int64_t row, int64_t group, int64_t num_groups) {
  const int64_t padded_groups = (num_groups + 3) / 4 * 4;
  return (row / 128) * 128 * padded_groups + (group / 4) * 512 + (row % 32) * 16 + ((row % 128) / 32) * 4 + (group % 4);
}

DSV4_HD constexpr int64_t sf_offset(SfLayout layout, int64_t row, int64_t group, int64_t num_groups) {
  return layout == SfLayout::kLinear ? sf_offset_linear(row, group, num_groups)
                                     : sf_offset_128x4(row, group, num_groups);
}

// Bytes of a whole scale tensor, padding included.
DSV4_HD constexpr int64_t sf_bytes(SfLayout layout, int64_t rows, int64_t num_groups) {
  return layout == SfLayout::kLinear ? rows * num_groups : (rows + 127) / 128 * 128 * ((num_groups + 3) / 4 * 4);
}

}  // namespace dsv4
