// RMS norm over rows.
#include <cmath>

#include "ops/norm/norm.h"
#include "ops/vec/vec.h"

namespace dsv4 {

float rms_factor(const float* x, int64_t dim, float eps, CpuIsa isa) {
  return 1.0f / std::sqrt(vec_kernels(isa).sum_squares(x, dim) / static_cast<float>(dim) + eps);
}

void rms_norm(const RmsNormArgs& args, const CpuContext& context) {
  const VecKernels& vec = vec_kernels(context.isa);
  for_rows(context, args.num_rows, 2 * args.dim, [&](int64_t row) {
    const float* x = args.x + row * args.x_stride;
    float* y = args.y + row * args.y_stride;
    vec.scale(x, args.weight, rms_factor(x, args.dim, args.eps, context.isa), args.dim, y);
    if (args.round_output) vec.round_bf16(y, args.dim);
  });
}

}  // namespace dsv4
