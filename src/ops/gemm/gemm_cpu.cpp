// gemm, reference: one weight row at a time, sums in double, scales applied where the contract says; a4 in exact integer
// groups, summed in binary32 in order of k.
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

// One row of activations under the run-time rule, its own global.
struct Nvfp4Row {
  std::vector<Nvfp4Group> groups;
  GlobalScale global{1.0f};
};

Nvfp4Row quantize_row(const float* x, int64_t count) {
  Nvfp4Row row;
  row.global = nvfp4_global_scale(group_amax(x, static_cast<int>(count)));
  const float rcp6 = nvfp4_rcp6(row.global);
  for (int64_t k = 0; k < count; k += kNvfp4GroupSize)
    row.groups.push_back(encode_nvfp4_runtime_group(x + k, row.global, rcp6));
  return row;
}

// Exact integer dot product of the doubled codes of one group.
int group_dot(const uint8_t* a, const uint8_t* b) {
  int sum = 0;
  for (int j = 0; j < kNvfp4GroupSize / 2; ++j) {
    sum += decode_e2m1_doubled(e2m1x2_even(a[j])) * decode_e2m1_doubled(e2m1x2_even(b[j]));
    sum += decode_e2m1_doubled(e2m1x2_odd(a[j])) * decode_e2m1_doubled(e2m1x2_odd(b[j]));
  }
  return sum;
}

float dot_a4(const Nvfp4Row& x, const WeightView& w, int64_t row) {
  const int64_t num_groups = w.cols / kNvfp4GroupSize;
  const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * (w.cols / 2);
  float sum = 0.0f;
  for (int64_t g = 0; g < num_groups; ++g) {
    const float scale = decode_ue4m3(x.groups[g].sf) * decode_ue4m3(w.sf[row * num_groups + g]);
    sum += static_cast<float>(group_dot(x.groups[g].codes, codes + g * (kNvfp4GroupSize / 2))) * scale;
  }
  return sum * (x.global.value * w.global.value * 0.25f);
}

void gemm_reference_a4(const GemmArgs& args, const CpuContext& context) {
  const WeightView& w = args.w->view;
  std::vector<Nvfp4Row> x;
  for (int64_t token = 0; token < args.num_tokens; ++token)
    x.push_back(quantize_row(args.x + token * args.x_stride, w.cols));
  context.pool.parallel_for(w.rows, [&](int64_t row) {
    for (int64_t token = 0; token < args.num_tokens; ++token) {
      const float y = dot_a4(x[static_cast<size_t>(token)], w, row);
      args.y[token * args.y_stride + row] = args.round_output ? round_bf16(y) : y;
    }
  });
}

}  // namespace

void gemm_reference(const GemmArgs& args, const CpuContext& context) {
  if (args.x_to_nvfp4) return gemm_reference_a4(args, context);
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
