// Weight: sizes and element-wise decoding.
#include "ops/gemm/weight.h"

#include "base/check.h"
#include "base/math.h"
#include "codec/fp8_block.h"

namespace dsv4 {

int64_t WeightView::stored_bytes() const {
  switch (format) {
    case WeightFormat::kF32:
      return rows * cols * 4;
    case WeightFormat::kBf16:
      return rows * cols * 2;
    case WeightFormat::kFp8Block:
      return rows * cols + ceil_div(rows, kFp8WeightBlock) * ceil_div(cols, kFp8WeightBlock) * 4;
    case WeightFormat::kNvfp4:
      return rows * (cols / 2) + rows * (cols / kNvfp4GroupSize) + 4;
  }
  DSV4_CHECK(false, "weight format {}", static_cast<int>(format));
}

float decode_weight(const WeightView& w, int64_t row, int64_t col) {
  const int64_t idx = row * w.cols + col;
  switch (w.format) {
    case WeightFormat::kF32:
      return static_cast<const float*>(w.data)[idx];
    case WeightFormat::kBf16:
      return decode_bf16(static_cast<const bf16*>(w.data)[idx]);
    case WeightFormat::kFp8Block: {
      const int64_t block = (row / kFp8WeightBlock) * ceil_div(w.cols, kFp8WeightBlock) + col / kFp8WeightBlock;
      return decode_e4m3(static_cast<const uint8_t*>(w.data)[idx]) * w.block_scales[block];
    }
    case WeightFormat::kNvfp4: {
      const uint8_t byte = static_cast<const uint8_t*>(w.data)[idx / 2];
      const uint8_t sf = w.sf[row * (w.cols / kNvfp4GroupSize) + col / kNvfp4GroupSize];
      return decode_nvfp4(idx % 2 == 0 ? e2m1x2_even(byte) : e2m1x2_odd(byte), sf, w.global);
    }
  }
  DSV4_CHECK(false, "weight format {}", static_cast<int>(w.format));
}

}  // namespace dsv4
