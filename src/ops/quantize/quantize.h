// quantize: rows of numbers -> NVFP4, FP8 or bf16 rows, and back. Contract and CPU reference of every kernel in this folder.
//
// Sources:   dense rows (bf16 or binary32), optionally RMS-normalised first;
//            clamped SwiGLU of a gate and an up row (ops/moe/swiglu.h), times the row's routing weight;
//            attention output rotated back by the query's position (inverse RoPE on the last rope_dim channels of each head).
// Results:   kNvfp4   run-time rule of codec/nvfp4.h, global 1, given, per row, or computed per row (amax(row) / 2688);
//            kFp8     e4m3, one ue8m0 per 128 columns (codec/fp8_block.h);
//            kBf16    rounded once.
// Rounding:  the RMS norm sums squares in binary64, rounds the sum to binary32, and its result to bf16 before quantising;
//            SwiGLU is quantised from binary32; the rotation is rounded to bf16 before quantising.
// Every backend gives the same bytes (memcmp), but for sign and payload of a NaN in y: conversions in hardware drop them. NaN elements are
// ignored by amax and encode as e2m1 0x7, e4m3 0x7f.
#pragma once

#include <cstdint>

#include "codec/nvfp4.h"
#include "codec/sf_layout.h"
#include "ops/cpu_context.h"
#include "ops/gemm/gemm.h"  // OpCost

namespace dsv4 {

constexpr int kFp8ActBlock = 128;

enum class RowFormat : uint8_t { kNvfp4, kFp8, kBf16 };
enum class GlobalMode : uint8_t {
  kOne,         // no global: 1
  kGiven,       // global[0]
  kPerRow,      // global[row]
  kComputeRow,  // amax(row) / 2688, written to row_global
};

// Where quantised rows go. cols is a multiple of 16 (kFp8: of 128).
struct QuantizedRows {
  RowFormat format = RowFormat::kNvfp4;
  GlobalMode global_mode = GlobalMode::kOne;
  SfLayout sf_layout = SfLayout::kLinear;
  uint8_t* codes = nullptr;  // kNvfp4 [num_rows, cols / 2]; kFp8 [num_rows, cols]
  uint8_t* sf = nullptr;     // kNvfp4 ue4m3, see sf_matrix_rows; kFp8 ue8m0 [num_rows, cols / 128]
  bf16* y = nullptr;         // kBf16 [num_rows, cols]; other formats: also write the normalised row here, or nullptr
  const float* global = nullptr;  // kGiven [1], kPerRow [num_rows]
  float* row_global = nullptr;    // kComputeRow [num_rows]
  int64_t sf_matrix_rows = 0;  // k128x4: rows of one matrix, each padded to 128 on its own; 0 = all rows are one matrix
};

// Bytes of the scale tensor for num_rows rows of cols columns.
int64_t quantized_sf_bytes(const QuantizedRows& out, int64_t num_rows, int64_t cols);

struct QuantizeArgs {
  const void* x;            // [num_rows, cols], rows x_stride apart, 16-byte aligned
  bool x_is_f32;            // else bf16
  const bf16* norm_weight;  // [cols], or nullptr: no norm
  float norm_eps;
  int64_t num_rows;  // 0 is legal
  int64_t cols;      // multiple of 16; with norm or kComputeRow at most 16384
  int64_t x_stride;  // elements, multiple of 8
  QuantizedRows out;
};

struct SwigluQuantizeArgs {
  const bf16* gate;  // [num_rows, cols], rows stride apart
  const bf16* up;    // [num_rows, cols], rows stride apart
  const float* rho;  // [num_rows] routing weight, or nullptr: 1
  float limit;       // positive, at most 80
  int64_t num_rows, cols, stride;
  QuantizedRows out;
};

// Row r = group * num_tokens + token of the result holds heads [group * heads_per_group, ...) of that token: what the grouped
// output projection reads. cols = heads_per_group * head_dim.
struct InverseRopeQuantizeArgs {
  const bf16* x;             // [num_tokens, num_heads, head_dim]
  const float* cos_sin;      // [num_positions, rope_dim]: rope_dim / 2 cosines, then as many sines
  const int32_t* positions;  // [num_tokens] row of cos_sin
  int64_t num_tokens;
  int num_heads, head_dim, rope_dim, heads_per_group;
  QuantizedRows out;  // num_rows = num_tokens * num_heads / heads_per_group; sf_matrix_rows = num_tokens for 128x4
};

void quantize_rows(const QuantizeArgs& args, const CpuContext& context);
void swiglu_quantize(const SwigluQuantizeArgs& args, const CpuContext& context);
void inverse_rope_quantize(const InverseRopeQuantizeArgs& args, const CpuContext& context);

// ---- decoding ----

struct DequantizeArgs {
  const uint8_t* codes;  // [num_rows, cols / 2]
  const uint8_t* sf;     // ue4m3, linear [num_rows, cols / 16] or 128x4
  const float* global;   // kGiven [1], kPerRow [num_rows], kOne nullptr
  const int32_t* rows;   // nullptr: all rows in order; else [num_out]: which row, -1 = zeros
  int32_t* bad_rows;     // with rows: incremented for each index outside [-1, num_rows); such rows become zeros
  void* y;               // [num_out, cols] bf16 or binary32
  bool y_is_f32;
  GlobalMode global_mode;
  SfLayout sf_layout;
  int64_t num_rows, num_out, cols;  // rows == nullptr: num_out = num_rows; cols a multiple of 16
};

void dequantize_rows(const DequantizeArgs& args, const CpuContext& context);

// e4m3 [num_rows, cols] times block_scales[row / 128][col / 128] -> bf16. A NaN code gives a NaN.
struct DequantizeFp8BlockArgs {
  const uint8_t* codes;       // [num_rows, cols]
  const float* block_scales;  // [ceil(num_rows / 128), ceil(cols / 128)]
  bf16* y;                    // [num_rows, cols]
  int64_t num_rows, cols;     // cols a multiple of 16
};

void dequantize_fp8_blocks(const DequantizeFp8BlockArgs& args, const CpuContext& context);

// Bytes a call must move (each input and output once).
OpCost quantize_cost(int64_t num_rows, int64_t cols, int input_bytes_per_element, RowFormat format);
OpCost dequantize_cost(int64_t num_out, int64_t cols, int output_bytes_per_element);

}  // namespace dsv4
