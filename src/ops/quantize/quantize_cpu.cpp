// The loops that define quantize.h.
#include <atomic>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "base/math.h"
#include "codec/fp8_block.h"
#include "ops/moe/swiglu.h"
#include "ops/quantize/quantize.h"

namespace dsv4 {
namespace {

int64_t sf_position(const QuantizedRows& out, int64_t num_rows, int64_t row, int64_t group, int64_t num_groups) {
  if (out.sf_layout == SfLayout::kLinear) return sf_offset_linear(row, group, num_groups);
  const int64_t matrix_rows = out.sf_matrix_rows ? out.sf_matrix_rows : num_rows;
  return row / matrix_rows * sf_bytes(SfLayout::k128x4, matrix_rows, num_groups) +
         sf_offset_128x4(row % matrix_rows, group, num_groups);
}

GlobalScale row_global(const QuantizedRows& out, const float* x, int64_t row, int64_t cols) {
  switch (out.global_mode) {
    case GlobalMode::kOne:
      return {1.0f};
    case GlobalMode::kGiven:
      return {out.global[0]};
    case GlobalMode::kPerRow:
      return {out.global[row]};
    case GlobalMode::kComputeRow:
      return nvfp4_global_scale(group_amax(x, static_cast<int>(cols)));
  }
  return {1.0f};
}

void write_row(const QuantizedRows& out, const float* x, int64_t num_rows, int64_t row, int64_t cols) {
  if (out.y)
    for (int64_t c = 0; c < cols; ++c) out.y[row * cols + c] = encode_bf16(x[c]);
  if (out.format == RowFormat::kNvfp4) {
    const GlobalScale global = row_global(out, x, row, cols);
    if (out.global_mode == GlobalMode::kComputeRow) out.row_global[row] = global.value;
    const float rcp6 = nvfp4_rcp6(global);
    for (int64_t g = 0; g < cols / kNvfp4GroupSize; ++g) {
      const Nvfp4Group group = encode_nvfp4_runtime_group(x + g * kNvfp4GroupSize, global, rcp6);
      for (int j = 0; j < 8; ++j) out.codes[row * (cols / 2) + g * 8 + j] = group.codes[j];
      out.sf[sf_position(out, num_rows, row, g, cols / kNvfp4GroupSize)] = group.sf;
    }
  } else if (out.format == RowFormat::kFp8) {
    for (int64_t b = 0; b < cols / kFp8ActBlock; ++b) {
      const uint8_t scale = fp8_block_scale(group_amax(x + b * kFp8ActBlock, kFp8ActBlock));
      out.sf[row * (cols / kFp8ActBlock) + b] = scale;
      for (int64_t c = b * kFp8ActBlock; c < (b + 1) * kFp8ActBlock; ++c)
        out.codes[row * cols + c] = encode_fp8_block_element(x[c], scale);
    }
  }
}

// Runs make(row, x) for every row in parallel and quantises x.
template <class Make>
void quantize_each(const QuantizedRows& out, int64_t num_rows, int64_t cols, const CpuContext& context,
                   const Make& make) {
  DSV4_CHECK(cols % (out.format == RowFormat::kFp8 ? kFp8ActBlock : kNvfp4GroupSize) == 0, "cols = {}", cols);
  if (out.format == RowFormat::kNvfp4 && out.sf_layout == SfLayout::k128x4)
    std::fill_n(out.sf, quantized_sf_bytes(out, num_rows, cols), uint8_t{0});
  context.pool.parallel_for(num_rows, [&](int64_t row) {
    std::vector<float> x(static_cast<size_t>(cols));
    make(row, x.data());
    write_row(out, x.data(), num_rows, row, cols);
  });
}

void normalize(float* x, int64_t cols, const bf16* weight, float eps) {
  double sum = 0;
  for (int64_t c = 0; c < cols; ++c) sum += static_cast<double>(x[c]) * x[c];
  const float factor = 1.0f / std::sqrt(static_cast<float>(sum) / static_cast<float>(cols) + eps);
  for (int64_t c = 0; c < cols; ++c) x[c] = round_bf16(decode_bf16(weight[c]) * (x[c] * factor));
}

}  // namespace

int64_t quantized_sf_bytes(const QuantizedRows& out, int64_t num_rows, int64_t cols) {
  if (out.format == RowFormat::kBf16) return 0;
  if (out.format == RowFormat::kFp8) return num_rows * (cols / kFp8ActBlock);
  const int64_t matrix_rows = out.sf_matrix_rows ? out.sf_matrix_rows : num_rows;
  if (matrix_rows == 0) return 0;
  return num_rows / matrix_rows * sf_bytes(out.sf_layout, matrix_rows, cols / kNvfp4GroupSize);
}

void quantize_rows(const QuantizeArgs& args, const CpuContext& context) {
  quantize_each(args.out, args.num_rows, args.cols, context, [&](int64_t row, float* x) {
    for (int64_t c = 0; c < args.cols; ++c) {
      const int64_t at = row * args.x_stride + c;
      x[c] = args.x_is_f32 ? static_cast<const float*>(args.x)[at] : decode_bf16(static_cast<const bf16*>(args.x)[at]);
    }
    if (args.norm_weight) normalize(x, args.cols, args.norm_weight, args.norm_eps);
  });
}

void swiglu_quantize(const SwigluQuantizeArgs& args, const CpuContext& context) {
  quantize_each(args.out, args.num_rows, args.cols, context, [&](int64_t row, float* x) {
    const float rho = args.rho ? args.rho[row] : 1.0f;
    for (int64_t c = 0; c < args.cols; ++c)
      x[c] = swiglu(decode_bf16(args.gate[row * args.stride + c]), decode_bf16(args.up[row * args.stride + c]), rho,
                    args.limit);
  });
}

void inverse_rope_quantize(const InverseRopeQuantizeArgs& args, const CpuContext& context) {
  const int64_t cols = int64_t{args.heads_per_group} * args.head_dim;
  const int pairs = args.rope_dim / 2;
  quantize_each(args.out, args.num_tokens * (args.num_heads / args.heads_per_group), cols, context,
                [&](int64_t row, float* x) {
                  const int64_t group = row / args.num_tokens, token = row % args.num_tokens;
                  const bf16* source = args.x + token * args.num_heads * args.head_dim + group * cols;
                  const float* cos = args.cos_sin + int64_t{args.positions[token]} * args.rope_dim;
                  const float* sin = cos + pairs;
                  for (int64_t c = 0; c < cols; ++c) x[c] = decode_bf16(source[c]);
                  for (int h = 0; h < args.heads_per_group; ++h) {
                    float* rotated = x + (h + 1) * args.head_dim - args.rope_dim;
                    for (int i = 0; i < pairs; ++i) {
                      const float even = rotated[2 * i], odd = rotated[2 * i + 1];
                      rotated[2 * i] = round_bf16(even * cos[i] + odd * sin[i]);
                      rotated[2 * i + 1] = round_bf16(odd * cos[i] - even * sin[i]);
                    }
                  }
                });
}

void dequantize_rows(const DequantizeArgs& args, const CpuContext& context) {
  DSV4_CHECK(args.cols % kNvfp4GroupSize == 0, "cols = {}", args.cols);
  const int64_t num_groups = args.cols / kNvfp4GroupSize;
  std::atomic<int32_t> bad_rows{0};
  context.pool.parallel_for(args.num_out, [&](int64_t out_row) {
    const int64_t row = args.rows ? args.rows[out_row] : out_row;
    if (row < -1 || row >= args.num_rows) bad_rows.fetch_add(1);
    const bool present = row >= 0 && row < args.num_rows;
    GlobalScale global{1.0f};
    if (args.global_mode == GlobalMode::kGiven) global.value = args.global[0];
    if (args.global_mode == GlobalMode::kPerRow && present) global.value = args.global[row];
    for (int64_t c = 0; c < args.cols; ++c) {
      float value = 0.0f;
      if (present) {
        const uint8_t byte = args.codes[row * (args.cols / 2) + c / 2];
        const uint8_t sf = args.sf[sf_offset(args.sf_layout, row, c / kNvfp4GroupSize, num_groups)];
        value = decode_nvfp4(c % 2 ? e2m1x2_odd(byte) : e2m1x2_even(byte), sf, global);
      }
      if (args.y_is_f32)
        static_cast<float*>(args.y)[out_row * args.cols + c] = value;
      else
        static_cast<bf16*>(args.y)[out_row * args.cols + c] = encode_bf16(value);
    }
  });
  if (args.bad_rows) *args.bad_rows += bad_rows.load();
}

void dequantize_fp8_blocks(const DequantizeFp8BlockArgs& args, const CpuContext& context) {
  const int64_t blocks = ceil_div(args.cols, kFp8WeightBlock);
  context.pool.parallel_for(args.num_rows, [&](int64_t row) {
    for (int64_t c = 0; c < args.cols; ++c) {
      const float scale = args.block_scales[row / kFp8WeightBlock * blocks + c / kFp8WeightBlock];
      args.y[row * args.cols + c] = encode_bf16(decode_e4m3(args.codes[row * args.cols + c]) * scale);
    }
  });
}

OpCost quantize_cost(int64_t num_rows, int64_t cols, int input_bytes_per_element, RowFormat format) {
  const double output = format == RowFormat::kNvfp4 ? 0.5 + 1.0 / 16
                        : format == RowFormat::kFp8 ? 1.0 + 1.0 / 128
                                                    : 2.0;
  const double elements = static_cast<double>(num_rows) * static_cast<double>(cols);
  return {elements * (input_bytes_per_element + output), 0};
}

OpCost dequantize_cost(int64_t num_out, int64_t cols, int output_bytes_per_element) {
  const double elements = static_cast<double>(num_out) * static_cast<double>(cols);
  return {elements * (output_bytes_per_element + 0.5 + 1.0 / 16), 0};
}

}  // namespace dsv4
