// gemm: y[t, n] = sum_k x[t, k] * W[n, k], W in any WeightFormat.
//
// Numerics: x is binary32 (bf16-representable unless the run is exact). Products and sums in binary32, the order is the
// implementation's own (panel.h) but depends on neither num_tokens nor the number of threads; NVFP4: e2m1 * sf sums, then
// one multiplication by global; FP8 block: partial sums per 128 columns times the block scale. The reference sums in double.
// kAmx with x_is_bf16: bf16 tiles, which take as zero products (before global or block scale) below max(2^-126, 2^-140 times the row's
// largest |x|) and, with BF16 weights, subnormal operands; and values of x that are no bf16 values as if cut to bf16.
// NaN scale factors and FP8 NaN codes are no valid weights: the result is then unspecified (the loader refuses them).
// round_output: each y is rounded to bf16 once, at the end (the model's linears outside exact mode).
// Throws for null pointers, negative sizes, strides below a row, a format without its scales, x_to_nvfp4 without an NVFP4 weight and
// an instruction set this machine lacks; how much memory the pointers hold is not checked.
#pragma once

#include <cstdint>

#include "ops/cpu_context.h"
#include "ops/gemm/weight.h"

namespace dsv4 {

struct GemmArgs {
  const float* x;      // [num_tokens, w.cols], rows x_stride apart
  const Weight* w;     // [rows, cols]
  float* y;            // [num_tokens, w.rows], rows y_stride apart; must not alias x
  int64_t num_tokens;  // 0 is legal
  int64_t x_stride;    // elements, >= w.cols
  int64_t y_stride;    // elements, >= w.rows
  bool round_output;   // to bf16
  // Says that every x is a bf16 value, which allows bf16 products (kAmx; the others: binary32 only).
  bool x_is_bf16 = false;
  // a4: each row of x is quantised by the run-time rule, then as moe.h says; needs an NVFP4 weight.
  bool x_to_nvfp4 = false;
};

void gemm(const GemmArgs& args, const CpuContext& context);

// What one call must move and compute: the bound that bench and statistics use.
struct OpCost {
  double bytes = 0;
  double flops = 0;
};
OpCost gemm_cost(const WeightView& w, int64_t num_tokens);

}  // namespace dsv4
