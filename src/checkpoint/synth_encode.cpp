// Encoding synthetic values as each variant stores them, in parallel over rows.
#include "checkpoint/synth_encode.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/math.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/synth_loops.h"
#include "codec/fp8_block.h"
#include "codec/mxfp4.h"

namespace dsv4 {
namespace {

constexpr int64_t kChunkBytes = 8ll << 20;  // small enough for the heap to hand it out again without new pages
constexpr float kCalibratedAmax = 8.0f;     // of a unit-size activation: what a calibration run would find

// Which storage a matrix has in a variant.
StoredFormat stored_as(const LogicalTensor& tensor, SynthVariant variant) {
  if (tensor.tensor_class != TensorClass::kQuantisable || variant == SynthVariant::kBf16) return StoredFormat::kBf16;
  if (tensor.role != TensorRole::kRoutedExpert) return StoredFormat::kFp8Block;
  if (variant == SynthVariant::kOfficial) return StoredFormat::kMxfp4;
  return variant == SynthVariant::kModelOpt ? StoredFormat::kNvfp4ModelOpt : StoredFormat::kNvfp4Compressed;
}

bool needs_global(SynthPartKind kind) {
  return kind == SynthPartKind::kNvfp4Codes || kind == SynthPartKind::kGlobalScale ||
         kind == SynthPartKind::kGlobalScaleRcp;
}

float tile_amax(const std::vector<float>& values, int64_t num_rows, int64_t cols, int64_t tile) {
  const int64_t begin = tile * kFp8WeightBlock;
  const int count = static_cast<int>(std::min<int64_t>(kFp8WeightBlock, cols - begin));
  float amax = 0.0f;
  for (int64_t row = 0; row < num_rows; ++row) amax = std::max(amax, group_amax(&values[row * cols + begin], count));
  return amax;
}

}  // namespace

std::vector<SynthPart> list_synth_parts(const LogicalTensor& tensor, SynthVariant variant) {
  const auto part = [&tensor](std::string_view suffix, DType dtype, Shape shape, SynthPartKind kind) {
    return SynthPart{{tensor.name + std::string(suffix), dtype, std::move(shape)}, kind, &tensor};
  };
  if (!tensor.is_matrix()) {
    if (tensor.tensor_class == TensorClass::kExpertTable)
      return {part("", DType::kI64, tensor.shape, SynthPartKind::kExpertTable)};
    if (tensor.tensor_class == TensorClass::kF32) return {part("", DType::kF32, tensor.shape, SynthPartKind::kF32)};
    return {part("", DType::kBf16, tensor.shape, SynthPartKind::kBf16)};
  }
  const int64_t rows = tensor.shape[0];
  const int64_t cols = tensor.shape[1];
  const Shape tiles{ceil_div(rows, kFp8WeightBlock), ceil_div(cols, kFp8WeightBlock)};
  const Shape packed{rows, cols / 2};
  const Shape groups16{rows, cols / kNvfp4GroupSize};
  switch (stored_as(tensor, variant)) {
    case StoredFormat::kFp8Block:
      if (variant == SynthVariant::kCompressed)
        return {part(".weight", DType::kF8E4M3, tensor.shape, SynthPartKind::kFp8Codes),
                part(".weight_scale", DType::kBf16, tiles, SynthPartKind::kFp8Scales)};
      return {part(".weight", DType::kF8E4M3, tensor.shape, SynthPartKind::kFp8Codes),
              part(".scale", DType::kF8E8M0, tiles, SynthPartKind::kFp8Scales)};
    case StoredFormat::kMxfp4:
      if (cols % kMxfp4GroupSize != 0)
        throw_bad_input(
            "{}: {} columns are not a multiple of 32, so the official variant (MXFP4 experts) cannot hold it",
            tensor.name, cols);
      return {part(".weight", DType::kI8, packed, SynthPartKind::kMxfp4Codes),
              part(".scale", DType::kF8E8M0, {rows, cols / kMxfp4GroupSize}, SynthPartKind::kMxfp4Scales)};
    case StoredFormat::kNvfp4ModelOpt:
      return {part(".weight", DType::kU8, packed, SynthPartKind::kNvfp4Codes),
              part(".weight_scale", DType::kF8E4M3, groups16, SynthPartKind::kNvfp4Scales),
              part(".weight_scale_2", DType::kF32, {}, SynthPartKind::kGlobalScale),
              part(".input_scale", DType::kF32, {}, SynthPartKind::kInputScale)};
    case StoredFormat::kNvfp4Compressed:
      return {part(".weight_packed", DType::kU8, packed, SynthPartKind::kNvfp4Codes),
              part(".weight_scale", DType::kF8E4M3, groups16, SynthPartKind::kNvfp4Scales),
              part(".weight_global_scale", DType::kF32, {1}, SynthPartKind::kGlobalScaleRcp),
              part(".input_global_scale", DType::kF32, {1}, SynthPartKind::kInputScaleRcp)};
    default:
      return {part(".weight", DType::kBf16, tensor.shape, SynthPartKind::kBf16)};
  }
}

SynthEncoder::SynthEncoder(const ModelConfig& config, const SynthOptions& options)
    : config_(config),
      variant_(options.variant),
      seed_(options.seed),
      pool_(options.num_threads),
      scratch_(static_cast<size_t>(pool_.num_threads())) {}

void SynthEncoder::encode(const SynthPart& part, const std::function<void(std::vector<std::byte>)>& sink) {
  if (part.kind == SynthPartKind::kNvfp4Scales) {
    DSV4_CHECK(part.tensor->name == sf_owner_, "{}: scale factors before the codes", part.spec.name);
    sf_owner_.clear();
    return sink(std::move(sf_));
  }
  const SynthSource source(seed_, *part.tensor, config_);
  const GlobalScale global = needs_global(part.kind) ? global_scale(*part.tensor) : GlobalScale{1.0f};
  if (part.kind == SynthPartKind::kNvfp4Codes) {
    sf_owner_ = part.tensor->name;
    stage(*part.tensor);
    sf_.resize(static_cast<size_t>(source.rows() * source.cols() / kNvfp4GroupSize));
  }
  const int64_t unit_rows = part.rows_per_unit();
  const int64_t num_units = ceil_div(part.rows(), unit_rows);
  const int64_t units_per_chunk = std::max<int64_t>(1, kChunkBytes / (unit_rows * part.row_bytes()));
  for (int64_t first = 0; first < num_units; first += units_per_chunk) {
    const int64_t count = std::min(units_per_chunk, num_units - first);
    const int64_t rows = std::min(part.rows(), (first + count) * unit_rows) - first * unit_rows;
    std::vector<std::byte> chunk(static_cast<size_t>(rows * part.row_bytes()));
    pool_.parallel_for_with_thread(count, [&](int64_t unit, int thread) {
      encode_unit(part, source, global, first + unit, chunk.data() + unit * unit_rows * part.row_bytes(),
                  scratch_[static_cast<size_t>(thread)]);
    });
    sink(std::move(chunk));
  }
  if (part.kind == SynthPartKind::kNvfp4Codes) {
    const auto done = staged_.find(part.tensor->name);
    spare_.push_back(std::move(done->second.values));
    staged_.erase(done);
  }
}

SynthEncoder::Staged& SynthEncoder::stage(const LogicalTensor& tensor) {
  const auto [it, is_new] = staged_.try_emplace(tensor.name);
  Staged& staged = it->second;
  if (!is_new) return staged;
  const SynthSource source(seed_, tensor, config_);
  const int64_t cols = source.cols();
  if (!spare_.empty()) {
    staged.values = std::move(spare_.back());
    spare_.pop_back();
  }
  staged.values.resize(static_cast<size_t>(source.rows() * cols));
  std::vector<float> row_amax(static_cast<size_t>(source.rows()));
  pool_.parallel_for_with_thread(source.rows(), [&](int64_t row, int thread) {
    std::vector<float>& values = scratch_[static_cast<size_t>(thread)];
    values.resize(static_cast<size_t>(cols));
    source.fill_row(row, values.data());
    row_amax[static_cast<size_t>(row)] = synth_amax(values.data(), cols);
    synth_encode_bf16(values.data(), cols, &staged.values[static_cast<size_t>(row * cols)]);
  });
  staged.amax = *std::max_element(row_amax.begin(), row_amax.end());
  return staged;
}

// As decoders will multiply: for compressed-tensors the reciprocal of the stored divisor. w1 and w3 share theirs.
GlobalScale SynthEncoder::global_scale(const LogicalTensor& tensor) {
  const std::string stem = tensor.name.substr(0, tensor.name.size() - 2);
  const bool is_down = tensor.name.ends_with("w2");
  const std::string key = stem + (is_down ? "w2" : "w13");
  if (const auto it = globals_.find(key); it != globals_.end()) return it->second;
  float amax = stage(tensor).amax;
  if (!is_down) {
    LogicalTensor other = tensor;
    other.name = stem + (tensor.name.ends_with("w1") ? "w3" : "w1");
    amax = std::max(amax, stage(other).amax);
  }
  GlobalScale global = nvfp4_global_scale(amax);
  if (variant_ == SynthVariant::kCompressed) global = rcp(rcp(global));
  return globals_.emplace(key, global).first->second;
}

// w1 and w3 see the same input.
float SynthEncoder::input_scale(const LogicalTensor& tensor) const {
  std::string key = tensor.name;
  if (key.ends_with("w3")) key.back() = '1';
  return kCalibratedAmax * (1.0f + synth_uniform(seed_, key + ".input_scale")) / kNvfp4MaxProduct;
}

void SynthEncoder::encode_unit(const SynthPart& part, const SynthSource& source, GlobalScale global, int64_t unit,
                               std::byte* out_bytes, std::vector<float>& values) {
  auto* out = reinterpret_cast<uint8_t*>(out_bytes);
  const auto put_float = [out](float value) { std::memcpy(out, &value, sizeof(value)); };
  switch (part.kind) {
    case SynthPartKind::kGlobalScale:
      return put_float(global.value);
    case SynthPartKind::kGlobalScaleRcp:
      return put_float(rcp(global).value);
    case SynthPartKind::kInputScale:
      return put_float(input_scale(*part.tensor));
    case SynthPartKind::kInputScaleRcp:
      return put_float(1.0f / input_scale(*part.tensor));
    case SynthPartKind::kExpertTable: {
      std::vector<int64_t> experts(static_cast<size_t>(config_.num_topk));
      fill_synth_expert_row(seed_, part.tensor->name, unit, config_.num_experts, config_.num_topk, experts.data());
      std::memcpy(out, experts.data(), experts.size() * sizeof(int64_t));
      return;
    }
    case SynthPartKind::kFp8Codes:
    case SynthPartKind::kFp8Scales:
      return encode_fp8_tiles(part.kind, source, unit, out, values);
    default:
      break;
  }
  const int64_t cols = source.cols();
  values.resize(static_cast<size_t>(cols));
  if (part.kind == SynthPartKind::kNvfp4Codes) {
    synth_decode_bf16(&staged_.at(part.tensor->name).values[static_cast<size_t>(unit * cols)], cols, values.data());
  } else {
    source.fill_row(unit, values.data());
  }
  const float* x = values.data();
  switch (part.kind) {
    case SynthPartKind::kF32:
      std::memcpy(out, x, static_cast<size_t>(cols) * sizeof(float));
      break;
    case SynthPartKind::kBf16:
      synth_encode_bf16(x, cols, reinterpret_cast<uint16_t*>(out));
      break;
    case SynthPartKind::kMxfp4Codes:
      for (int64_t begin = 0; begin < cols; begin += kMxfp4GroupSize) {
        const uint8_t scale = fp4_block_scale(group_amax(x + begin, kMxfp4GroupSize));
        for (int64_t i = begin; i < begin + kMxfp4GroupSize; i += 2)
          out[i / 2] = pack_e2m1x2(encode_fp4_block_element(x[i], scale), encode_fp4_block_element(x[i + 1], scale));
      }
      break;
    case SynthPartKind::kMxfp4Scales:
      for (int64_t i = 0; i < cols; i += kMxfp4GroupSize)
        out[i / kMxfp4GroupSize] = fp4_block_scale(group_amax(x + i, kMxfp4GroupSize));
      break;
    case SynthPartKind::kNvfp4Codes:
      synth_nvfp4_row(x, cols, global, out, reinterpret_cast<uint8_t*>(sf_.data()) + unit * (cols / kNvfp4GroupSize));
      break;
    default:
      DSV4_CHECK(false, "part kind {}", static_cast<int>(part.kind));
  }
}

// One row of tiles: 128 rows of codes, or one row of scales.
void SynthEncoder::encode_fp8_tiles(SynthPartKind kind, const SynthSource& source, int64_t tile_row, uint8_t* out,
                                    std::vector<float>& values) const {
  const int64_t cols = source.cols();
  const int64_t first = tile_row * kFp8WeightBlock;
  const int64_t num_rows = std::min<int64_t>(kFp8WeightBlock, source.rows() - first);
  values.resize(static_cast<size_t>(num_rows * cols));
  for (int64_t row = 0; row < num_rows; ++row) source.fill_row(first + row, &values[static_cast<size_t>(row * cols)]);
  for (int64_t tile = 0; tile < ceil_div(cols, kFp8WeightBlock); ++tile) {
    const float amax = tile_amax(values, num_rows, cols, tile);
    const uint8_t ue8m0 = fp8_block_scale(amax);
    const bf16 rounded = encode_bf16(amax == 0.0f ? 1.0f : amax / kE4m3Max);
    const bool is_ue8m0 = variant_ != SynthVariant::kCompressed;
    if (kind == SynthPartKind::kFp8Scales) {
      if (is_ue8m0)
        out[tile] = ue8m0;
      else
        std::memcpy(out + 2 * tile, &rounded, 2);
      continue;
    }
    const float scale = is_ue8m0 ? decode_ue8m0(ue8m0) : decode_bf16(rounded);
    const int64_t end = std::min(cols, (tile + 1) * kFp8WeightBlock);
    for (int64_t row = 0; row < num_rows; ++row)
      for (int64_t col = tile * kFp8WeightBlock; col < end; ++col)
        out[row * cols + col] = encode_e4m3(values[static_cast<size_t>(row * cols + col)] / scale);
  }
}

}  // namespace dsv4
