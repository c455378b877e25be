// Compressor on the CPU: tokens write their slot in order; a completed window is pooled, normalised and rotated.
#include "ops/compressor/compressor.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "base/check.h"
#include "ops/norm/norm.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

void store_token(const CompressorArgs& args, int64_t token) {
  const CompressorShape& shape = args.shape;
  const int64_t width = shape.width(), phase = (args.first_position + token) % shape.ratio;
  const int64_t slot = shape.overlap ? shape.ratio + phase : phase;
  std::copy_n(args.value + token * width, width, args.state_value + slot * width);
  const float* gate = args.gate + token * width;
  const float* bias = args.ape + phase * width;
  float* stored = args.state_gate + slot * width;
  for (int64_t c = 0; c < width; ++c) stored[c] = gate[c] + bias[c];
}

void pool_window(const CompressorArgs& args, const VecKernels& vec, float* row) {
  const CompressorShape& shape = args.shape;
  const int64_t width = shape.width(), num_slots = shape.state_rows();
  static thread_local std::vector<const float*> value, gate;
  value.resize(static_cast<size_t>(num_slots));
  gate.resize(static_cast<size_t>(num_slots));
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    // Previous window: forward half; current window: own half.
    const int64_t offset = slot * width + (shape.overlap && slot >= shape.ratio ? shape.dim : 0);
    value[slot] = args.state_value + offset;
    gate[slot] = args.state_gate + offset;
  }
  vec.softmax_pool(value.data(), gate.data(), static_cast<int>(num_slots), shape.dim, row);
}

void shift_overlap(const CompressorArgs& args) {
  const int64_t half = args.shape.ratio * args.shape.width();
  std::copy_n(args.state_value + half, half, args.state_value);
  std::copy_n(args.state_gate + half, half, args.state_gate);
}

void finish_row(const CompressorArgs& args, int64_t window, const CpuContext& context, float* row) {
  const VecKernels& vec = vec_kernels(context.isa);
  const CompressorShape& shape = args.shape;
  if (args.round_output) vec.round_bf16(row, shape.dim);
  vec.scale(row, args.norm_weight, rms_factor(row, shape.dim, args.rms_eps, context.isa), shape.dim, row);
  if (args.round_output) vec.round_bf16(row, shape.dim);
  float cos[512], sin[512];
  rope_angles(*args.rope, window * shape.ratio, cos, sin);
  float* rotated = row + shape.dim - shape.rope_dim;
  rope_rotate(rotated, cos, sin, shape.rope_dim / 2, RopeDirection::kForward);
  if (args.round_output) vec.round_bf16(rotated, shape.rope_dim);
}

}  // namespace

int64_t num_completed_windows(int64_t first_position, int64_t num_tokens, int ratio) {
  return (first_position + num_tokens) / ratio - first_position / ratio;
}

void reset_compressor_state(const CompressorShape& shape, float* state_value, float* state_gate) {
  std::fill_n(state_value, shape.state_elems(), 0.0f);
  std::fill_n(state_gate, shape.state_elems(), -std::numeric_limits<float>::infinity());
}

void compress(const CompressorArgs& args, const CpuContext& context) {
  DSV4_CHECK(args.shape.rope_dim <= 1024 && args.shape.rope_dim <= args.shape.dim, "rope_dim = {}", args.shape.rope_dim);
  const VecKernels& vec = vec_kernels(context.isa);
  const int64_t first_window = args.first_position / args.shape.ratio;
  int64_t num_rows = 0;
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    store_token(args, token);
    if ((args.first_position + token + 1) % args.shape.ratio != 0) continue;
    pool_window(args, vec, args.rows + num_rows++ * args.shape.dim);
    if (args.shape.overlap) shift_overlap(args);
  }
  for_rows(context, num_rows, 8 * args.shape.dim, [&](int64_t r) {
    finish_row(args, first_window + r, context, args.rows + r * args.shape.dim);
  });
}

}  // namespace dsv4
