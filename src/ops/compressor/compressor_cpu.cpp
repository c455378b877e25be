// Compressor on the CPU: tokens write their slot in order; a completed window is pooled, normalised and rotated.
#include "ops/compressor/compressor.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "base/check.h"
#include "base/math.h"
#include "ops/norm/norm.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

// Channels [begin, end) of the finished row: storing, pooling and shifting never mix channels, so ranges run in parallel.
struct ChannelRange {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

void store_token(const CompressorArgs& args, int64_t token, ChannelRange range) {
  const CompressorShape& shape = args.shape;
  const int64_t width = shape.width(), phase = (args.first_position + token) % shape.ratio;
  const int64_t slot = shape.overlap ? shape.ratio + phase : phase;
  for (int64_t half = 0; half < width; half += shape.dim) {  // forward and own half, or the only one
    const int64_t from = token * width + half, to = slot * width + half;
    const float* bias = args.ape + phase * width + half;
    std::copy_n(args.value + from + range.begin, range.size(), args.state_value + to + range.begin);
    for (int64_t c = range.begin; c < range.end; ++c) args.state_gate[to + c] = args.gate[from + c] + bias[c];
  }
}

void pool_window(const CompressorArgs& args, const VecKernels& vec, ChannelRange range, float* row) {
  const CompressorShape& shape = args.shape;
  const int64_t width = shape.width(), num_slots = shape.state_rows();
  static thread_local std::vector<const float*> value, gate;
  value.resize(static_cast<size_t>(num_slots));
  gate.resize(static_cast<size_t>(num_slots));
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    // Previous window: forward half; current window: own half.
    const int64_t offset = slot * width + (shape.overlap && slot >= shape.ratio ? shape.dim : 0) + range.begin;
    value[static_cast<size_t>(slot)] = args.state_value + offset;
    gate[static_cast<size_t>(slot)] = args.state_gate + offset;
  }
  vec.softmax_pool(value.data(), gate.data(), static_cast<int>(num_slots), range.size(), row + range.begin);
}

void shift_overlap(const CompressorArgs& args, ChannelRange range) {
  const int64_t width = args.shape.width(), ratio = args.shape.ratio;
  for (int64_t slot = 0; slot < ratio; ++slot) {  // only the forward half of the previous window is ever read
    std::copy_n(args.state_value + (ratio + slot) * width + range.begin, range.size(),
                args.state_value + slot * width + range.begin);
    std::copy_n(args.state_gate + (ratio + slot) * width + range.begin, range.size(),
                args.state_gate + slot * width + range.begin);
  }
}

// All tokens, one range of channels.
void pool_channels(const CompressorArgs& args, const VecKernels& vec, ChannelRange range) {
  float* row = args.rows;
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    store_token(args, token, range);
    if ((args.first_position + token + 1) % args.shape.ratio != 0) continue;
    pool_window(args, vec, range, row);
    row += args.shape.dim;
    if (args.shape.overlap) shift_overlap(args, range);
  }
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
  DSV4_CHECK(args.shape.rope_dim <= 1024 && args.shape.rope_dim <= args.shape.dim, "rope_dim = {}",
             args.shape.rope_dim);
  const VecKernels& vec = vec_kernels(context.isa);
  // A multiple of the widest vector, so that where a range ends never changes how a channel is computed.
  constexpr int64_t kChannels = 128;
  const int64_t num_ranges = args.num_tokens < 8 ? 1 : ceil_div(args.shape.dim, kChannels);
  const int64_t range_size = num_ranges == 1 ? args.shape.dim : kChannels;
  for_rows(context, num_ranges, args.num_tokens * range_size * 16, [&](int64_t r) {
    pool_channels(args, vec, {r * range_size, std::min<int64_t>((r + 1) * range_size, args.shape.dim)});
  });
  const int64_t first_window = args.first_position / args.shape.ratio;
  const int64_t num_rows = num_completed_windows(args.first_position, args.num_tokens, args.shape.ratio);
  for_rows(context, num_rows, 8 * args.shape.dim,
           [&](int64_t r) { finish_row(args, first_window + r, context, args.rows + r * args.shape.dim); });
}

}  // namespace dsv4
