// rms_norm: y = w * (x * rsqrt(mean(x^2) + eps)), binary32 inside, one rounding to bf16 at the end if asked. Spec 1.5.
// Checks nothing: pointers and strides are the caller's.
#pragma once

#include <cstdint>

#include "ops/cpu_context.h"

namespace dsv4 {

struct RmsNormArgs {
  const float* x;       // [num_rows, dim], rows x_stride apart
  const float* weight;  // [dim], nullptr: no weight (the per-head norm of q)
  float* y;             // [num_rows, dim], rows y_stride apart; may be x
  int64_t num_rows;
  int64_t dim;
  int64_t x_stride;
  int64_t y_stride;
  float eps;
  bool round_output;  // to bf16
};

void rms_norm(const RmsNormArgs& args, const CpuContext& context);

// The factor rsqrt(mean(x^2) + eps).
float rms_factor(const float* x, int64_t dim, float eps, CpuIsa isa);

}  // namespace dsv4
