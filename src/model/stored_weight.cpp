// Building weight views.
#include "model/stored_weight.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/math.h"
#include "checkpoint/stored_matrix.h"
#include "codec/fp8_block.h"
#include "codec/mxfp4.h"

namespace dsv4 {
namespace {

const float* block_scales(const StoredMatrix& matrix, WeightArena& arena) {
  const TensorView& scale = matrix.scale;
  if (scale.dtype == DType::kF32) return scale.as<float>();
  const int64_t count = scale.elements();
  float* out = arena.add(count * static_cast<int64_t>(sizeof(float))).as<float>();
  for (int64_t i = 0; i < count; ++i)
    out[i] = scale.dtype == DType::kF8E8M0 ? decode_ue8m0(scale.as<uint8_t>()[i]) : decode_bf16(scale.as<bf16>()[i]);
  return out;
}

void set_mxfp4_as_nvfp4(const StoredMatrix& matrix, WeightArena& arena, WeightView& view) {
  const int64_t num_groups = matrix.rows * matrix.cols / kMxfp4GroupSize;
  const uint8_t* codes = matrix.weight.as<uint8_t>();
  const uint8_t* bytes = matrix.scale.as<uint8_t>();
  constexpr int kGroupBytes = kMxfp4GroupSize / 2;
  int max_byte = -1, min_byte = 256;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (mxfp4_group_is_zero(codes + g * kGroupBytes)) continue;
    max_byte = std::max<int>(max_byte, bytes[g]);
    min_byte = std::min<int>(min_byte, bytes[g]);
  }
  if (max_byte < 0) max_byte = min_byte = 127;  // all zero: any scale will do
  if (max_byte - min_byte > kMxfp4MaxExponentSpread)
    throw_bad_input(
        "{}: {}: MXFP4 group exponents spread over {} binades, NVFP4 holds {} without loss: convert the checkpoint "
        "with "
        "dsv4 quantize, which re-quantises this tensor and reports the loss",
        matrix.file, matrix.name, max_byte - min_byte, kMxfp4MaxExponentSpread);
  uint8_t* sf = arena.add(2 * num_groups).as<uint8_t>();
  for (int64_t g = 0; g < num_groups; ++g) {
    const int exponent = std::clamp(static_cast<int>(bytes[g]) - max_byte + 8, -9, 8);  // clamps only all-zero groups
    sf[2 * g] = sf[2 * g + 1] = ue4m3_power_of_two(exponent);
  }
  view.sf = sf;
  view.global = mxfp4_to_nvfp4_global(static_cast<uint8_t>(max_byte));
}

}  // namespace

HostBuffer& WeightArena::add(int64_t bytes) {
  auto buffer = std::make_unique<HostBuffer>(bytes);
  std::lock_guard lock(mutex_);
  return *buffers_.emplace_back(std::move(buffer));
}

Weight make_weight(const StoredMatrix& matrix, WeightArena& arena) {
  validate_scales(matrix);
  Weight weight;
  WeightView& view = weight.view;
  view.rows = matrix.rows;
  view.cols = matrix.cols;
  view.data = matrix.weight.data;
  switch (matrix.format) {
    case StoredFormat::kF32:
      view.format = WeightFormat::kF32;
      break;
    case StoredFormat::kBf16:
      view.format = WeightFormat::kBf16;
      break;
    case StoredFormat::kFp8Block:
      view.format = WeightFormat::kFp8Block;
      view.block_scales = block_scales(matrix, arena);
      break;
    case StoredFormat::kMxfp4:
      view.format = WeightFormat::kNvfp4;
      set_mxfp4_as_nvfp4(matrix, arena, view);
      break;
    case StoredFormat::kNvfp4ModelOpt:
    case StoredFormat::kNvfp4Compressed:
      view.format = WeightFormat::kNvfp4;
      view.sf = matrix.scale.as<uint8_t>();
      view.global = {matrix.global_scale};
      break;
  }
  return weight;
}

Weight slice_rows(const Weight& w, int64_t begin, int64_t count, WeightArena& arena) {
  DSV4_CHECK(begin >= 0 && count >= 0 && begin + count <= w.view.rows, "rows {}..{} of {}", begin, begin + count,
             w.view.rows);
  Weight slice;
  WeightView& view = slice.view;
  view = w.view;
  view.rows = count;
  const auto* data = static_cast<const std::byte*>(w.view.data);
  switch (view.format) {
    case WeightFormat::kF32:
      view.data = data + 4 * begin * view.cols;
      break;
    case WeightFormat::kBf16:
      view.data = data + 2 * begin * view.cols;
      break;
    case WeightFormat::kNvfp4:
      view.data = data + begin * view.cols / 2;
      view.sf = w.view.sf + begin * (view.cols / kNvfp4GroupSize);
      break;
    case WeightFormat::kFp8Block:
      if (begin % kFp8WeightBlock == 0) {
        view.data = data + begin * view.cols;
        view.block_scales = w.view.block_scales + begin / kFp8WeightBlock * ceil_div(view.cols, kFp8WeightBlock);
        break;
      }
      float* decoded = arena.add(4 * count * view.cols).as<float>();
      for (int64_t row = 0; row < count; ++row)
        for (int64_t col = 0; col < view.cols; ++col)
          decoded[row * view.cols + col] = decode_weight(w.view, begin + row, col);
      view = {WeightFormat::kF32, count, view.cols, decoded};
      break;
  }
  return slice;
}

std::vector<float> to_floats(const TensorView& view, const std::string& name) {
  const int64_t count = view.elements();
  std::vector<float> out(static_cast<size_t>(count));
  if (view.dtype == DType::kF32) {
    std::memcpy(out.data(), view.data, static_cast<size_t>(count) * 4);
  } else if (view.dtype == DType::kBf16) {
    for (int64_t i = 0; i < count; ++i) out[static_cast<size_t>(i)] = decode_bf16(view.as<bf16>()[i]);
  } else {
    throw_bad_input("{}: expected F32 or BF16, found {}", name, dtype_name(view.dtype));
  }
  return out;
}

}  // namespace dsv4
