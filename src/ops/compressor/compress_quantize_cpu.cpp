// The loops that define compress_quantize.h: token by token, channel order and rounding as in compressor_cpu.cpp.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/check.h"
#include "ops/attention/kv_view.h"
#include "ops/compressor/compress_quantize.h"
#include "ops/indexer/indexer.h"
#include "ops/norm/norm.h"
#include "ops/rope/rope.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

// One sequence: its rings and what all sequences share.
class Sequence {
 public:
  Sequence(const CompressCommon& common, int64_t state, CpuIsa isa)
      : common_(common),
        traits_(compressor_traits(common.kind)),
        value_(common.state_value + state * traits_.state_rows * traits_.width),
        gate_(common.state_gate + state * traits_.state_rows * traits_.width),
        isa_(isa),
        vec_(vec_kernels(isa)) {}

  // The token's projections into the ring. True: position completes a window.
  bool store(int64_t token, int64_t position) {
    const int64_t width = traits_.width, to = position % traits_.state_rows * width, phase = position % traits_.ratio;
    std::copy_n(common_.value + token * width, width, value_ + to);
    for (int64_t c = 0; c < width; ++c)
      gate_[to + c] = common_.gate[token * width + c] + common_.ape[phase * width + c];
    return phase + 1 == traits_.ratio;
  }

  // The window that position completes: pooled, normalised, rotated by cos_sin's row, written to its slot.
  void finish_window(int64_t position, int64_t rope_row, int32_t slot) {
    const int dim = traits_.dim;
    std::vector<float> row(static_cast<size_t>(dim)), weight(static_cast<size_t>(dim));
    pool(position, row.data());
    vec_.round_bf16(row.data(), dim);
    for (int c = 0; c < dim; ++c) weight[static_cast<size_t>(c)] = decode_bf16(common_.norm_weight[c]);
    vec_.scale(row.data(), weight.data(), rms_factor(row.data(), dim, common_.rms_eps, isa_), dim, row.data());
    vec_.round_bf16(row.data(), dim);
    const float* cos = common_.cos_sin + rope_row * kKvRopeDim;
    float* rotated = row.data() + dim - kKvRopeDim;
    rope_rotate(rotated, cos, cos + kKvRopeDim / 2, kKvRopeDim / 2, RopeDirection::kForward);
    vec_.round_bf16(rotated, kKvRopeDim);
    if (slot >= 0 && slot < common_.pages.num_rows) write(row.data(), slot);
  }

 private:
  // Earlier window first: its forward half; then the current one's own half (compressor.h).
  void pool(int64_t position, float* row) const {
    const bool overlap = traits_.state_rows == 2 * traits_.ratio;
    std::vector<const float*> value, gate;
    for (int64_t p = position - traits_.state_rows + 1; p <= position; ++p) {
      const int64_t ring_row =
          (p + traits_.state_rows) % traits_.state_rows;  // p >= -ratio: the first window has no earlier one
      const int64_t at = ring_row * traits_.width + (overlap && p > position - traits_.ratio ? traits_.dim : 0);
      value.push_back(value_ + at);
      gate.push_back(gate_ + at);
    }
    vec_.softmax_pool(value.data(), gate.data(), static_cast<int>(value.size()), traits_.dim, row);
  }

  void write(float* row, int32_t slot) const {
    const bool is_key = common_.kind == CompressorKind::kIndexer;
    const PageLayout page = is_key ? index_page_layout(common_.index_format) : kv_page_layout(common_.kv_format);
    std::vector<uint8_t> bytes;
    if (is_key) {
      if (common_.index_format != IndexFormat::kBf16) hadamard(row, traits_.dim);
      const IndexKeyLayout layout{common_.index_format, traits_.dim};
      bytes.resize(static_cast<size_t>(layout.row_bytes()));
      encode_index_key(layout, row, bytes.data());
    } else {
      const KvRowLayout layout{common_.kv_format, traits_.dim, kKvRopeDim};
      bytes.resize(static_cast<size_t>(layout.row_bytes()));
      encode_kv_row(layout, row, bytes.data());
    }
    std::copy_n(bytes.data(), page.data_bytes, common_.pages.data(slot, page));
    uint8_t* scales = common_.pages.scales(slot, page);
    std::fill_n(scales, page.scale_bytes, uint8_t{0});
    std::copy(bytes.begin() + page.data_bytes, bytes.end(), scales);
  }

  const CompressCommon& common_;
  const CompressorTraits traits_;
  float *value_, *gate_;
  const CpuIsa isa_;
  const VecKernels& vec_;
};

void require_formats(const CompressCommon& common) {
  DSV4_CHECK(common.kind == CompressorKind::kIndexer ? common.index_format != IndexFormat::kF32
                                                     : common.kv_format != KvFormat::kF32,
             "compress_quantize: pages hold no binary32 rows");
}

}  // namespace

void compress_quantize(const CompressDecodeArgs& args, const CpuContext& context) {
  require_formats(args.common);
  context.pool.parallel_for(args.num_tokens, [&](int64_t token) {
    Sequence sequence(args.common, args.states[token], context.isa);
    const int64_t position = args.positions[token];
    if (sequence.store(token, position)) sequence.finish_window(position, args.rope_rows[token], args.slots[token]);
  });
}

void compress_quantize(const CompressPrefillArgs& args, const CpuContext& context) {
  require_formats(args.common);
  Sequence sequence(args.common, 0, context.isa);
  int64_t window = 0;
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    const int64_t position = args.first_position + token;
    if (!sequence.store(token, position)) continue;
    sequence.finish_window(position, args.rope_rows[window], args.slots[window]);
    ++window;
  }
}

void reset_compressor_states(CompressorKind kind, float* state_value, float* state_gate, int64_t num_states,
                             const CpuContext&) {
  const CompressorTraits traits = compressor_traits(kind);
  std::fill_n(state_value, num_states * traits.state_rows * traits.width, 0.0f);
  std::fill_n(state_gate, num_states * traits.state_rows * traits.width, -std::numeric_limits<float>::infinity());
}

}  // namespace dsv4
