// The inner interface of the vector GEMMs: 16 output rows of one weight times a list of activation rows.
//
// gemm (gemm_simd.cpp) and moe (moe_simd.cpp) are loops over panels; an instruction set is a table of PanelKernels.
// Activation rows are first brought into the form a kernel reads (prepare), once per op, then shared by every panel.
//
// Order of the sums, the same for every list of rows and every thread (so results depend on neither):
//   NVFP4  lanes are output rows; per 16-group a partial sum of x * e2m1, times sf, added to the row's sum in order of k
//   others lanes are consecutive k; one sum per lane along the whole row (FP8: per 128 columns, times the block scale),
//          lanes folded at the end
//   tiles  (AMX, bf16 values of x) 32 columns at a time, two chains of 16; FP8 as above; a4 as on every instruction set
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/cpu_context.h"
#include "ops/gemm/weight.h"

namespace dsv4 {

constexpr int kPanelRows = 16;
constexpr int kPanelRecordCols = 64;    // columns of one record of a packed NVFP4 panel
constexpr int kPanelRecordBytes = 576;  // 512 of codes, 64 of scale factors: nine cache lines

enum class ActForm : uint8_t {
  kF32,        // as given
  kF32Panel,   // binary32, zero-padded to 64 columns, each 8 columns in the order 0 4 2 6 1 5 3 7
  kF32Padded,  // binary32, zero-padded to 64 columns
  kNvfp4,      // quantised by the run-time rule; Nvfp4ActRow
  // AMX. Rows are bf16 [P], P = round_up(K, 64), each 8 columns in the order 0 4 1 5 2 6 3 7, then a binary32 that the sums
  // are multiplied with. All rows equally spaced.
  kTileRows,       // times a power of two
  kTileRowsNvfp4,  // quantised by the run-time rule, decoded, times 2^112; the binary32 is the row's global
  // AMX. Blocks of 16 rows (the last one fewer): int32 width, padding to 64 bytes, bf16 [P / 2][width][2], binary32 [width].
  // A row's pointer is that of its block.
  kTileCols,
  kTileColsScaled,  // times a power of two
};

constexpr bool is_tile_form(ActForm form) { return form >= ActForm::kTileRows; }
constexpr bool is_col_form(ActForm form) { return form >= ActForm::kTileCols; }

// What decides the form of rows.
struct ActHint {
  bool a4;           // NVFP4 activations
  bool bf16;         // every x is a bf16 value
  int64_t num_rows;  // that meet one weight, about
};
// Below this the int8 dot products are faster than tiles; the results are the same (docs/kernels/cpu.md).
constexpr int64_t kMinTileRowsA4 = 5;

// A kNvfp4 row of K columns padded to P = round_up(K, 64): int8 doubled codes [P], each 8 columns in the order
// 0 2 4 6 1 3 5 7; int32 corrections [P / 16] = -12 * sum of the group's codes (kernels use weights + 12 as unsigned);
// binary32 256 * sf [P / 16]; binary32 global.
struct Nvfp4ActRow {
  const int8_t* codes;
  const int32_t* corrections;
  const float* sf256;
  float global;
};

struct PanelArgs {
  const WeightView* w;
  const std::byte* packed;    // NVFP4: the panel's records; other formats: unused
  int64_t row_begin;          // first output row, a multiple of 16
  int num_rows;               // output rows in this panel, 1..16
  const std::byte* const* x;  // [num_x] prepared rows; column forms: starts at the first row of a block
  int64_t num_x;
  ActForm form;
  float* out;          // [num_x, 16], all scales applied, not rounded to bf16; rows past num_rows undefined
  std::byte* scratch;  // kPanelScratchBytes, 64-byte aligned
};

constexpr int64_t kPanelScratchBytes = 128 << 10;

struct PanelKernels {
  ActForm (*form)(WeightFormat format, const ActHint& hint);
  // Not kF32. Column forms: out is the row's place in its block, pair_stride the bytes to the next two columns.
  void (*prepare)(ActForm form, const float* x, int64_t cols, std::byte* out, int64_t pair_stride);
  // Around calls of dot on one thread that share form, x and num_x (tiles are configured and released).
  void (*enter)(ActForm form, const std::byte* const* x, int64_t num_x, int64_t cols);
  void (*leave)(ActForm form);
  void (*dot)(const PanelArgs& args);
  void (*dot_pair)(const PanelArgs& a,
                   const PanelArgs& b);  // two panels of one shape and format and the same rows of x
  // Element-wise steps of moe; count is a multiple of 8.
  void (*swiglu)(const float* gate, const float* up, float rho, float limit, bool round_inputs, bool round_output,
                 int64_t count, float* h);
  void (*round_bf16)(float* x, int64_t count);
  void (*add)(const float* x, bool round_x, int64_t count, float* sum);  // sum += x, x rounded to bf16 first if asked
};

template <int kValue>
struct IntConstant {
  static constexpr int value = kValue;
};

// nullptr for kReference.
const PanelKernels* panel_kernels(CpuIsa isa);
const PanelKernels& panel_kernels_avx2();
const PanelKernels& panel_kernels_avx512();
const PanelKernels& panel_kernels_amx();

inline int64_t panel_padded_cols(int64_t cols) {
  return (cols + kPanelRecordCols - 1) / kPanelRecordCols * kPanelRecordCols;
}
inline int64_t packed_panel_bytes(int64_t cols) {
  return panel_padded_cols(cols) / kPanelRecordCols * kPanelRecordBytes;
}

// Bytes of one prepared row, a multiple of 64.
inline int64_t act_row_bytes(ActForm form, int64_t cols) {
  const int64_t padded = panel_padded_cols(cols);
  switch (form) {
    case ActForm::kF32:
    case ActForm::kF32Panel:
    case ActForm::kF32Padded:
      return padded * 4;
    case ActForm::kNvfp4:
      return (padded + padded / 16 * 8 + 4 + 63) / 64 * 64;
    case ActForm::kTileRows:
    case ActForm::kTileRowsNvfp4:
      return padded * 2 + 64;  // also keeps 16 rows off the same cache sets
    case ActForm::kTileCols:
    case ActForm::kTileColsScaled:
      return padded * 2 + 8;  // a sixteenth of a block
  }
  return 0;
}

inline Nvfp4ActRow nvfp4_act_row(const std::byte* row, int64_t padded_cols) {
  const std::byte* corrections = row + padded_cols;
  const std::byte* sf256 = corrections + padded_cols / 16 * 4;
  const float* global = reinterpret_cast<const float*>(sf256 + padded_cols / 16 * 4);
  return {reinterpret_cast<const int8_t*>(row), reinterpret_cast<const int32_t*>(corrections),
          reinterpret_cast<const float*>(sf256), *global};
}

}  // namespace dsv4
