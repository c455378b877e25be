// gemm, reference: one weight row at a time, sums in double, scales applied where the contract says.
#include <algorithm>
#include <vector>

#include "codec/fp8_block.h"
#include "ops/gemm/gemm_backends.h"

namespace dsv4 {
namespace {

// The row without the scales that gemm.h applies after summing: global (NVFP4), block scales (FP8).
void decode_unscaled_row(const WeightView& w, int64_t row, float* out) {
  const int64_t cols = w.cols;
  switch (w.format) {
    case WeightFormat::kF32:
      std::copy_n(static_cast<const float*>(w.data) + row * cols, cols, out);
      return;
    case WeightFormat::kBf16: {
      const bf16* data = static_cast<const bf16*>(w.data) + row * cols;
      for (int64_t k = 0; k < cols; ++k) out[k] = decode_bf16(data[k]);
      return;
    }
    case WeightFormat::kFp8Block: {
      const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * cols;
      for (int64_t k = 0; k < cols; ++k) out[k] = decode_e4m3(data[k]);
      return;
    }
    case WeightFormat::kNvfp4: {
      const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * (cols / 2);
      const uint8_t* sf = w.sf + row * (cols / kNvfp4GroupSize);
      for (int64_t k = 0; k < cols; k += 2) {
        const float scale = decode_ue4m3(sf[k / kNvfp4GroupSize]);
        out[k] = decode_e2m1(e2m1x2_even(data[k / 2])) * scale;
        out[k + 1] = decode_e2m1(e2m1x2_odd(data[k / 2])) * scale;
      }
      return;
    }
  }
}

double dot(const float* x, const float* w, int64_t count) {
  double sum = 0.0;
  for (int64_t k = 0; k < count; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(w[k]);
  return sum;
}

float dot_row(const WeightView& w, int64_t row, const float* unscaled, const float* x) {
  if (w.format == WeightFormat::kNvfp4) return static_cast<float>(dot(x, unscaled, w.cols) * w.global.value);
  if (w.format != WeightFormat::kFp8Block) return static_cast<float>(dot(x, unscaled, w.cols));
  const float* scales = w.block_scales + (row / kFp8WeightBlock) * ((w.cols + kFp8WeightBlock - 1) / kFp8WeightBlock);
  double sum = 0.0;
  for (int64_t k = 0; k < w.cols; k += kFp8WeightBlock)
    sum += dot(x + k, unscaled + k, std::min<int64_t>(kFp8WeightBlock, w.cols - k)) * scales[k / kFp8WeightBlock];
  return static_cast<float>(sum);
}

}  // namespace

void gemm_reference(const GemmArgs& args, const CpuContext& context) {
  const WeightView& w = args.w->view;
  context.pool.parallel_for(w.rows, [&](int64_t row) {
    thread_local std::vector<float> unscaled;
    unscaled.resize(static_cast<size_t>(w.cols));
    decode_unscaled_row(w, row, unscaled.data());
    for (int64_t token = 0; token < args.num_tokens; ++token) {
      const float y = dot_row(w, row, unscaled.data(), args.x + token * args.x_stride);
      args.y[token * args.y_stride + row] = args.round_output ? round_bf16(y) : y;
    }
  });
}

}  // namespace dsv4
