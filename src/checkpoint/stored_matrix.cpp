// Recognition of the storage variants of spec 7.1, 7.4 and 7.5, tensor by tensor; nothing is taken from quantization_config.
#include "checkpoint/stored_matrix.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/check.h"
#include "base/math.h"
#include "codec/bf16.h"
#include "codec/fp8_block.h"
#include "codec/mxfp4.h"
#include "codec/nvfp4.h"

namespace dsv4 {
namespace {

// The tensors found under one name, while the search is on. The first problem ends it.
class Search {
 public:
  Search(const Checkpoint& checkpoint, std::string_view name) : checkpoint_(checkpoint) { result_.matrix.name = name; }

  const TensorView* take(std::string_view suffix) {
    std::string name = result_.matrix.name + std::string(suffix);
    const TensorView* tensor = checkpoint_.find(name);
    if (tensor == nullptr) return nullptr;
    const std::string& file = checkpoint_.file_of(name);
    std::string& files = result_.matrix.file;
    if (files.find(file) == std::string::npos) files += (files.empty() ? "" : ", ") + file;
    result_.tensor_names.push_back(std::move(name));
    return tensor;
  }

  template <class... T>
  void fail(fmt::format_string<T...> format, T&&... args) {
    if (result_.problem.empty()) result_.problem = fmt::format(format, std::forward<T>(args)...);
  }
  bool failed() const { return !result_.problem.empty(); }

  void expect(const TensorView& tensor, std::string_view suffix, std::initializer_list<DType> dtypes,
              const Shape& shape) {
    if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
      std::string names;
      for (DType dtype : dtypes) names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
      fail("{}{}: dtype {}, expected {}", matrix().name, suffix, dtype_name(tensor.dtype), names);
    } else if (tensor.shape != shape) {
      fail("{}{}: shape {}, expected {}", matrix().name, suffix, to_string(tensor.shape), to_string(shape));
    }
  }

  // One binary32 stored as [] or [1].
  float scalar(const TensorView& tensor, std::string_view suffix) {
    if (tensor.dtype != DType::kF32 || !(tensor.shape.empty() || tensor.shape == Shape{1})) {
      fail("{}{}: {} {}, expected one F32 (shape [] or [1])", matrix().name, suffix, dtype_name(tensor.dtype),
           to_string(tensor.shape));
      return 1.0f;
    }
    const float value = *tensor.as<float>();
    if (!(std::isfinite(value) && value > 0.0f)) {
      fail("{}{}: {}, expected a finite positive number", matrix().name, suffix, value);
      return 1.0f;
    }
    return value;
  }
  // The file has the divisor; engines multiply.
  float scalar_rcp(const TensorView& tensor, std::string_view suffix) {
    const float value = rcp(GlobalScaleRcp{scalar(tensor, suffix)}).value;
    if (!(std::isfinite(value) && value > 0.0f))
      fail("{}{}: {} has no finite reciprocal", matrix().name, suffix, *tensor.as<float>());
    return value;
  }

  StoredMatrix& matrix() { return result_.matrix; }
  MatrixSearch finish() { return std::move(result_); }

 private:
  const Checkpoint& checkpoint_;
  MatrixSearch result_;
};

// Two e2m1 codes a byte, groups of group_size along the columns.
void read_packed_shape(Search& search, const TensorView& weight, std::string_view suffix, int group_size) {
  StoredMatrix& m = search.matrix();
  m.weight = weight;
  m.rows = weight.shape[0];
  if (weight.shape[1] > INT64_MAX / 2) return search.fail("{}{}: shape {}", m.name, suffix, to_string(weight.shape));
  m.cols = 2 * weight.shape[1];
  if (m.cols % group_size != 0)
    search.fail("{}{}: {} columns are not a multiple of the group of {}", m.name, suffix, m.cols, group_size);
}

void recognise_fp8(Search& search, const TensorView& weight) {
  StoredMatrix& m = search.matrix();
  m.format = StoredFormat::kFp8Block;
  m.weight = weight;
  m.rows = weight.shape[0];
  m.cols = weight.shape[1];
  const TensorView* scale = nullptr;
  std::string_view scale_suffix;
  for (std::string_view suffix : {".scale", ".weight_scale", ".weight_scale_inv"}) {
    const TensorView* found = search.take(suffix);
    if (found == nullptr) continue;
    if (scale != nullptr) return search.fail("{}: has both {} and {}", m.name, scale_suffix, suffix);
    scale = found;
    scale_suffix = suffix;
  }
  if (scale == nullptr)
    return search.fail("{}: weight is F8_E4M3 but there is no .scale, .weight_scale or .weight_scale_inv", m.name);
  search.expect(*scale, scale_suffix, {DType::kF8E8M0, DType::kF32, DType::kBf16},
                {ceil_div(m.rows, kFp8WeightBlock), ceil_div(m.cols, kFp8WeightBlock)});
  m.scale = *scale;
}

void recognise_mxfp4(Search& search, const TensorView& weight) {
  StoredMatrix& m = search.matrix();
  m.format = StoredFormat::kMxfp4;
  read_packed_shape(search, weight, ".weight", kMxfp4GroupSize);
  const TensorView* scale = search.take(".scale");
  if (scale == nullptr) return search.fail("{}: weight is I8 (MXFP4) but there is no .scale", m.name);
  search.expect(*scale, ".scale", {DType::kF8E8M0}, {m.rows, m.cols / kMxfp4GroupSize});
  m.scale = *scale;
}

void recognise_nvfp4_modelopt(Search& search, const TensorView& weight) {
  StoredMatrix& m = search.matrix();
  m.format = StoredFormat::kNvfp4ModelOpt;
  read_packed_shape(search, weight, ".weight", kNvfp4GroupSize);
  const TensorView* scale = search.take(".weight_scale");
  const TensorView* global = search.take(".weight_scale_2");
  const TensorView* input = search.take(".input_scale");
  if (scale == nullptr || global == nullptr)
    return search.fail("{}: weight is U8 (NVFP4) but there is no .{}", m.name,
                       scale == nullptr ? "weight_scale" : "weight_scale_2");
  search.expect(*scale, ".weight_scale", {DType::kF8E4M3}, {m.rows, m.cols / kNvfp4GroupSize});
  m.scale = *scale;
  m.global_scale = search.scalar(*global, ".weight_scale_2");
  if (input != nullptr) m.input_scale = search.scalar(*input, ".input_scale");
}

void recognise_nvfp4_compressed(Search& search, const TensorView& packed) {
  StoredMatrix& m = search.matrix();
  m.format = StoredFormat::kNvfp4Compressed;
  if (packed.dtype != DType::kU8)
    return search.fail("{}.weight_packed: dtype {}, expected U8", m.name, dtype_name(packed.dtype));
  read_packed_shape(search, packed, ".weight_packed", kNvfp4GroupSize);
  const TensorView* scale = search.take(".weight_scale");
  const TensorView* global = search.take(".weight_global_scale");
  const TensorView* input = search.take(".input_global_scale");
  if (scale == nullptr || global == nullptr)
    return search.fail("{}: has .weight_packed but no .{}", m.name,
                       scale == nullptr ? "weight_scale" : "weight_global_scale");
  search.expect(*scale, ".weight_scale", {DType::kF8E4M3}, {m.rows, m.cols / kNvfp4GroupSize});
  m.scale = *scale;
  m.global_scale = search.scalar_rcp(*global, ".weight_global_scale");
  if (input != nullptr) m.input_scale = search.scalar_rcp(*input, ".input_global_scale");
}

template <class T, class Bad>
int64_t first_bad(const TensorView& tensor, const Bad& is_bad) {
  const T* values = tensor.as<T>();
  const int64_t count = tensor.elements();
  // Blocks without an exit inside let the compiler vectorise: this pass reads every scale of a model.
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    bool any = false;
    for (int64_t i = begin; i < end; ++i) any |= is_bad(values[i]);
    if (!any) continue;
    for (int64_t i = begin; i < end; ++i)
      if (is_bad(values[i])) return i;
  }
  return -1;
}

int64_t first_bad_scale(const TensorView& scale) {
  switch (scale.dtype) {
    case DType::kF8E4M3:
      return first_bad<uint8_t>(scale, [](uint8_t byte) { return byte >= 0x7f; });  // NaN or a sign bit
    case DType::kF8E8M0:
      return first_bad<uint8_t>(scale, [](uint8_t byte) { return byte == 0xff; });
    case DType::kBf16:
      return first_bad<uint16_t>(scale, [](uint16_t bits) { return bits >= 0x7f80; });
    case DType::kF32:
      return first_bad<uint32_t>(scale, [](uint32_t bits) { return bits >= 0x7f800000u; });
    default:
      return -1;
  }
}

template <class T>
std::optional<std::string> find_expert_problem(std::string_view name, const TensorView& table, int num_experts) {
  const int64_t bad = first_bad<T>(table, [num_experts](T expert) { return expert < 0 || expert >= num_experts; });
  if (bad < 0) return std::nullopt;
  return fmt::format("{}: expert {} for token {}, expected 0 to {}", name, table.as<T>()[bad], bad / table.shape[1],
                     num_experts - 1);
}

}  // namespace

std::string_view stored_format_name(StoredFormat format) {
  constexpr std::array<std::string_view, kNumStoredFormats> kNames{
      "F32", "BF16", "FP8 block", "MXFP4", "NVFP4 ModelOpt", "NVFP4 compressed-tensors"};
  return kNames[static_cast<size_t>(format)];
}

MatrixSearch search_matrix(const Checkpoint& checkpoint, std::string_view name) {
  Search search(checkpoint, name);
  const TensorView* weight = search.take(".weight");
  const TensorView* packed = search.take(".weight_packed");
  if (weight == nullptr && packed == nullptr) {
    search.fail("missing tensor {}.weight (or .weight_packed)", name);
  } else if (weight != nullptr && packed != nullptr) {
    search.fail("{}: has both .weight and .weight_packed", name);
  } else if (const TensorView& stored = weight != nullptr ? *weight : *packed; stored.shape.size() != 2) {
    search.fail("{}{}: shape {}, expected a matrix", name, weight != nullptr ? ".weight" : ".weight_packed",
                to_string(stored.shape));
  } else if (packed != nullptr) {
    recognise_nvfp4_compressed(search, *packed);
  } else {
    switch (weight->dtype) {
      case DType::kF8E4M3:
        recognise_fp8(search, *weight);
        break;
      case DType::kI8:
        recognise_mxfp4(search, *weight);
        break;
      case DType::kU8:
        recognise_nvfp4_modelopt(search, *weight);
        break;
      case DType::kF32:
      case DType::kBf16:
        search.matrix().format = weight->dtype == DType::kF32 ? StoredFormat::kF32 : StoredFormat::kBf16;
        search.matrix().weight = *weight;
        search.matrix().rows = weight->shape[0];
        search.matrix().cols = weight->shape[1];
        break;
      default:
        search.fail("{}.weight: dtype {}, expected F32, BF16, F8_E4M3, I8 (MXFP4) or U8 (NVFP4)", name,
                    dtype_name(weight->dtype));
    }
  }
  return search.finish();
}

std::optional<std::string> find_scale_problem(const StoredMatrix& matrix) {
  if (matrix.format == StoredFormat::kF32 || matrix.format == StoredFormat::kBf16) return std::nullopt;
  const int64_t bad = first_bad_scale(matrix.scale);
  if (bad < 0) return std::nullopt;
  uint32_t bits = 0;
  const int size = dtype_bytes(matrix.scale.dtype);
  for (int i = 0; i < size; ++i) bits |= std::to_integer<uint32_t>(matrix.scale.data[bad * size + i]) << (8 * i);
  return fmt::format("{}: {}: scale at row {}, group {} is 0x{:0{}x}: NaN, infinite or negative as {}", matrix.file,
                     matrix.name, bad / matrix.scale.shape[1], bad % matrix.scale.shape[1], bits, 2 * size,
                     dtype_name(matrix.scale.dtype));
}

std::optional<std::string> find_expert_table_problem(std::string_view name, const TensorView& table, int num_experts) {
  if (table.dtype == DType::kI64) return find_expert_problem<int64_t>(name, table, num_experts);
  DSV4_CHECK(table.dtype == DType::kI32, "{}: {}", name, dtype_name(table.dtype));
  return find_expert_problem<int32_t>(name, table, num_experts);
}

void validate_scales(const StoredMatrix& matrix) {
  if (const auto problem = find_scale_problem(matrix)) throw_bad_input("{}", *problem);
}

void validate_expert_table(std::string_view name, const TensorView& table, int num_experts) {
  if (const auto problem = find_expert_table_problem(name, table, num_experts)) throw_bad_input("{}", *problem);
}

StoredMatrix Checkpoint::matrix(std::string_view name_without_weight) const& {
  MatrixSearch search = search_matrix(*this, name_without_weight);
  if (!search.problem.empty()) throw_bad_input("{}: {}", folder_, search.problem);
  return std::move(search.matrix);
}

}  // namespace dsv4
