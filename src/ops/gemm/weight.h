// A weight matrix [rows, cols] as stored (y = x W^T: rows are outputs, cols the contraction axis K), decoded on the fly.
#pragma once

#include <cstdint>
#include <memory>

#include "codec/bf16.h"
#include "codec/nvfp4.h"

namespace dsv4 {

enum class WeightFormat : uint8_t {
  kF32,       // [rows, cols] binary32
  kBf16,      // [rows, cols] bf16
  kFp8Block,  // [rows, cols] e4m3, times block_scales[row / 128][col / 128]
  kNvfp4,     // [rows, cols / 2] e2m1x2, times sf[row][col / 16], times global; cols is a multiple of 16
};

struct WeightView {
  WeightFormat format = WeightFormat::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  const void* data = nullptr;
  const uint8_t* sf = nullptr;          // kNvfp4: ue4m3 [rows, cols / 16], linear layout
  const float* block_scales = nullptr;  // kFp8Block: [ceil(rows / 128), ceil(cols / 128)]
  GlobalScale global{1.0f};             // kNvfp4

  int64_t stored_bytes() const;  // what one full read moves: data + scales
};

// Decoded value of one element in binary32, in the order of codec/nvfp4.h. For references and tests.
float decode_weight(const WeightView& w, int64_t row, int64_t col);

// Layout made once at load for one instruction set; private to gemm/.
struct PackedWeight;

// What ops take: the stored matrix, and its repacked form if one was made (gemm_pack.h).
struct Weight {
  WeightView view;
  std::shared_ptr<const PackedWeight> packed;
};

}  // namespace dsv4
