// Cache rows in device memory: pages of equal size, each with its rows' data first and their scale bytes behind.
//
// Rows hold 512 channels, the last 64 rotated, and the same bytes as ops/attention/kv_view.h, split per page as FlashMLA's MODEL1
// and FlashInfer's NVFP4 caches have them (spec 6.3, 6.5):
//   kBf16   1024 data bytes                                              no scales
//   kFp8     576 data bytes: 448 e4m3, 64 bf16                           8: ue8m0 per 64 channels, 1 zero
//   kNvfp4   352 data bytes: 224 e2m1x2, 64 bf16                         32: ue4m3 per 16 channels, 4 zeros; global scale 1
// Index keys hold 128 channels:
//   kBf16 256 + 0, kFp8 128 + 4 (one binary32 power of two), kFp4 64 + 4 (ue8m0 per 32 channels)
// Row r lies in page r / rows_per_page. Nothing else is stored in a page; page_stride may be larger than its contents.
#pragma once

#include <cstdint>

#include "codec/host_device.h"
#include "ops/precision.h"

namespace dsv4 {

constexpr int kKvHeadDim = 512, kKvRopeDim = 64, kIndexKeyDim = 128;

struct PageLayout {
  int32_t data_bytes;   // per row
  int32_t scale_bytes;  // per row
};

DSV4_HD constexpr PageLayout kv_page_layout(KvFormat format) {
  return format == KvFormat::kFp8     ? PageLayout{576, 8}
         : format == KvFormat::kNvfp4 ? PageLayout{352, 32}
                                      : PageLayout{1024, 0};
}
DSV4_HD constexpr PageLayout index_page_layout(IndexFormat format) {
  return format == IndexFormat::kFp8   ? PageLayout{128, 4}
         : format == IndexFormat::kFp4 ? PageLayout{64, 4}
                                       : PageLayout{256, 0};
}

struct DevicePages {
  uint8_t* base = nullptr;  // 16-byte aligned
  int64_t page_stride = 0;  // bytes, multiple of 16
  int32_t rows_per_page = 1;
  int32_t num_rows = 0;  // rows outside [0, num_rows) are never touched

  DSV4_HD uint8_t* data(int32_t row, PageLayout layout) const {
    return base + row / rows_per_page * page_stride + row % rows_per_page * int64_t{layout.data_bytes};
  }
  DSV4_HD uint8_t* scales(int32_t row, PageLayout layout) const {
    return base + row / rows_per_page * page_stride + int64_t{rows_per_page} * layout.data_bytes +
           row % rows_per_page * int64_t{layout.scale_bytes};
  }
};

}  // namespace dsv4
