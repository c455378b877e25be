// Decides the action per matrix and lays tensors out in shards.
#include "checkpoint/quantize/plan.h"

#include <algorithm>
#include <map>

#include "base/check.h"
#include "base/math.h"
#include "checkpoint/stored_matrix.h"
#include "codec/fp8_block.h"
#include "codec/nvfp4.h"

namespace dsv4 {
namespace {

bool is_nvfp4(StoredFormat format) {
  return format == StoredFormat::kNvfp4ModelOpt || format == StoredFormat::kNvfp4Compressed;
}

std::string stats_kind(const LogicalTensor& tensor) {
  const std::string role(tensor_role_name(tensor.role));
  if (tensor.role != TensorRole::kRoutedExpert && tensor.role != TensorRole::kSharedExpert) return role;
  return role + (tensor.name.ends_with(".w2") ? ", w2" : ", w1 w3");
}

MatrixAction nvfp4_action(const StoredMatrix& matrix) {
  switch (matrix.format) {
    case StoredFormat::kNvfp4ModelOpt:
      return MatrixAction::kCopy;
    case StoredFormat::kNvfp4Compressed:
      return MatrixAction::kRenameNvfp4;
    case StoredFormat::kMxfp4:
      return MatrixAction::kCastMxfp4;
    case StoredFormat::kF32:
    case StoredFormat::kBf16:
    case StoredFormat::kFp8Block:
      break;
  }
  if (matrix.cols % kNvfp4GroupSize != 0)
    throw_bad_input("{}: {}: {} columns are not a multiple of {}: NVFP4 cannot hold them", matrix.file, matrix.name,
                    matrix.cols, kNvfp4GroupSize);
  return MatrixAction::kEncodeNvfp4;
}

MatrixAction kept_action(const StoredMatrix& matrix, bool has_official_scale) {
  if (matrix.format == StoredFormat::kNvfp4Compressed) return MatrixAction::kRenameNvfp4;
  if (matrix.format == StoredFormat::kFp8Block && !has_official_scale) return MatrixAction::kRenameFp8;
  return MatrixAction::kCopy;
}

MatrixAction choose_action(const StoredMatrix& matrix, TensorRole role, DenseFormat dense, bool has_official_scale) {
  if (role == TensorRole::kRoutedExpert || dense == DenseFormat::kNvfp4) return nvfp4_action(matrix);
  if (dense == DenseFormat::kFp8 && matrix.format != StoredFormat::kFp8Block) {
    if (matrix.format != StoredFormat::kF32 && matrix.format != StoredFormat::kBf16)
      throw_bad_input("{}: {}: stored as {}: --dense fp8 would round it a second time and make it larger", matrix.file,
                      matrix.name, stored_format_name(matrix.format));
    return MatrixAction::kEncodeFp8;
  }
  return kept_action(matrix, has_official_scale);
}

class Planner {
 public:
  Planner(const Checkpoint& checkpoint, const QuantizeOptions& options) : checkpoint_(checkpoint), options_(options) {}

  QuantizePlan plan() {
    for (const LogicalTensor& tensor : list_tensors(checkpoint_.config())) {
      if (tensor.tensor_class == TensorClass::kQuantisable) {
        plan_matrix(tensor);
      } else if (tensor.is_matrix()) {
        for (const std::string& name : search_matrix(checkpoint_, tensor.name).tensor_names) copy(name, -1);
      } else {
        copy(tensor.name, -1);
      }
      close_unit();
    }
    std::vector<std::string> drafts;
    for (const auto& file : checkpoint_.files())
      for (const auto& [name, view] : file->tensors())
        if (is_mtp_tensor(name)) drafts.push_back(name);
    std::sort(drafts.begin(), drafts.end());
    for (const std::string& name : drafts) {
      copy(name, -1);
      close_unit();
    }
    const bool changes = std::any_of(plan_.jobs.begin(), plan_.jobs.end(),
                                     [](const MatrixJob& job) { return job.action != MatrixAction::kCopy; });
    if (!changes)
      throw_bad_input("{}: nothing to convert: the routed experts are NVFP4 already and --dense {} changes no matrix",
                      checkpoint_.folder(), dense_format_name(options_.dense));
    find_partners();
    finish_shards();
    return std::move(plan_);
  }

 private:
  void plan_matrix(const LogicalTensor& tensor) {
    MatrixSearch search = search_matrix(checkpoint_, tensor.name);
    DSV4_CHECK(search.problem.empty(), "{}", search.problem);
    MatrixJob job;
    job.matrix = std::move(search.matrix);
    job.role = tensor.role;
    job.kind = stats_kind(tensor);
    job.action =
        choose_action(job.matrix, job.role, options_.dense, checkpoint_.find(tensor.name + ".scale") != nullptr);
    const int idx = static_cast<int>(plan_.jobs.size());
    const StoredMatrix& m = job.matrix;
    switch (job.action) {
      case MatrixAction::kCopy:
        for (const std::string& name : search.tensor_names) copy(name, idx);
        break;
      case MatrixAction::kEncodeNvfp4:
      case MatrixAction::kCastMxfp4:
        make(m.name + ".weight", DType::kU8, {m.rows, m.cols / 2}, OutputPart::kCodes, idx);
        make(m.name + ".weight_scale", DType::kF8E4M3, {m.rows, m.cols / kNvfp4GroupSize}, OutputPart::kSf, idx);
        make(m.name + ".weight_scale_2", DType::kF32, {}, OutputPart::kGlobal, idx);
        make(m.name + ".input_scale", DType::kF32, {}, OutputPart::kInputScale, idx);
        break;
      case MatrixAction::kRenameNvfp4:
        rename(m.name + ".weight", m.weight, idx);
        rename(m.name + ".weight_scale", m.scale, idx);
        make(m.name + ".weight_scale_2", DType::kF32, {}, OutputPart::kGlobal, idx);
        make(m.name + ".input_scale", DType::kF32, {}, OutputPart::kInputScale, idx);
        break;
      case MatrixAction::kEncodeFp8:
        make(m.name + ".weight", DType::kF8E4M3, {m.rows, m.cols}, OutputPart::kCodes, idx);
        make(m.name + ".scale", DType::kF8E8M0, {ceil_div(m.rows, kFp8WeightBlock), ceil_div(m.cols, kFp8WeightBlock)},
             OutputPart::kSf, idx);
        break;
      case MatrixAction::kRenameFp8:
        rename(m.name + ".weight", m.weight, idx);
        if (m.scale.dtype == DType::kBf16)
          make(m.name + ".scale", DType::kF32, m.scale.shape, OutputPart::kSf, idx);  // widened: exact
        else
          rename(m.name + ".scale", m.scale, idx);
        break;
    }
    plan_.jobs.push_back(std::move(job));
  }

  void copy(const std::string& name, int job) { add(name, checkpoint_.at(name), job); }
  void rename(std::string name, const TensorView& view, int job) {
    // StoredMatrix holds its own copy of the view; the plan points at the file's.
    for (const char* suffix : {".weight", ".weight_packed", ".weight_scale", ".weight_scale_inv"}) {
      const TensorView* found = checkpoint_.find(name.substr(0, name.rfind('.')) + suffix);
      if (found != nullptr && found->data == view.data) return add(std::move(name), *found, job);
    }
    DSV4_CHECK(false, "{}: source tensor not found", name);
  }
  void add(std::string name, const TensorView& source, int job) {
    unit_.push_back({{std::move(name), source.dtype, source.shape},
                     OutputPart::kSource,
                     job,
                     &source,
                     static_cast<uint64_t>(source.bytes())});
  }
  void make(std::string name, DType dtype, Shape shape, OutputPart part, int job) {
    const auto bytes = static_cast<uint64_t>(num_elements(shape) * dtype_bytes(dtype));
    unit_.push_back({{std::move(name), dtype, std::move(shape)}, part, job, nullptr, bytes});
  }

  // The tensors of one matrix stay in one shard.
  void close_unit() {
    uint64_t bytes = 0;
    for (const OutputTensor& tensor : unit_) bytes += tensor.bytes;
    if (plan_.shards.empty() ||
        (!plan_.shards.back().tensors.empty() && plan_.shards.back().bytes + bytes > options_.shard_bytes))
      plan_.shards.emplace_back();
    OutputShard& shard = plan_.shards.back();
    shard.bytes += bytes;
    plan_.target_bytes += bytes;
    std::move(unit_.begin(), unit_.end(), std::back_inserter(shard.tensors));
    unit_.clear();
  }

  void find_partners() {
    std::map<std::string, int> by_name;
    for (size_t idx = 0; idx < plan_.jobs.size(); ++idx)
      if (plan_.jobs[idx].role == TensorRole::kRoutedExpert)
        by_name[plan_.jobs[idx].matrix.name] = static_cast<int>(idx);
    for (const auto& [name, idx] : by_name) {
      if (!name.ends_with(".w1")) continue;
      const int other = by_name.at(name.substr(0, name.size() - 1) + "3");
      MatrixJob& w1 = plan_.jobs[static_cast<size_t>(idx)];
      MatrixJob& w3 = plan_.jobs[static_cast<size_t>(other)];
      const auto encodes = [](MatrixAction action) {
        return action == MatrixAction::kEncodeNvfp4 || action == MatrixAction::kCastMxfp4;
      };
      if (encodes(w1.action) != encodes(w3.action))
        throw_bad_input("{}: {} is {} and {} is {}: they cannot get one common global scale", checkpoint_.folder(),
                        name, stored_format_name(w1.matrix.format), w3.matrix.name,
                        stored_format_name(w3.matrix.format));
      w1.partner = other;
      w3.partner = idx;
    }
  }

  // Falling element size, so that every tensor is aligned; the scalars of NVFP4 matrices come behind the bytes they are
  // computed with, behind everything whose size is a multiple of 4. Stable inside a class: model order, and scale factors
  // directly after their codes, which produce them.
  int file_class(const OutputTensor& tensor) const {
    const int element = dtype_bytes(tensor.spec.dtype);
    if (tensor.part == OutputPart::kGlobal || tensor.part == OutputPart::kInputScale) return 4;
    if (element == 8) return 0;
    if (element == 4 && tensor.part == OutputPart::kSource) return 1;
    if (element == 4) return 4;  // widened block scales
    if (element == 2) return tensor.bytes % 4 == 0 ? 2 : 5;
    const bool odd_codes = tensor.part == OutputPart::kSf && code_bytes(tensor.job) % 4 != 0;
    return tensor.bytes % 4 == 0 && !odd_codes ? 3 : 6;
  }

  int64_t code_bytes(int job_idx) const {
    const MatrixJob& job = plan_.jobs[static_cast<size_t>(job_idx)];
    return job.matrix.rows * job.matrix.cols / (job.action == MatrixAction::kEncodeFp8 ? 1 : 2);
  }

  void finish_shards() {
    for (size_t idx = 0; idx < plan_.shards.size(); ++idx) {
      OutputShard& shard = plan_.shards[idx];
      std::stable_sort(shard.tensors.begin(), shard.tensors.end(),
                       [this](const OutputTensor& a, const OutputTensor& b) { return file_class(a) < file_class(b); });
      shard.file_name = plan_.shards.size() == 1
                            ? "model.safetensors"
                            : fmt::format("model-{:05}-of-{:05}.safetensors", idx + 1, plan_.shards.size());
    }
  }

  const Checkpoint& checkpoint_;
  const QuantizeOptions& options_;
  QuantizePlan plan_;
  std::vector<OutputTensor> unit_;
};

}  // namespace

std::string_view dense_format_name(DenseFormat format) {
  switch (format) {
    case DenseFormat::kKeep:
      return "keep";
    case DenseFormat::kFp8:
      return "fp8";
    case DenseFormat::kNvfp4:
      return "nvfp4";
  }
  return "";
}

std::string_view scale_rule_name(ScaleRule rule) {
  switch (rule) {
    case ScaleRule::kModelOpt:
      return "modelopt";
    case ScaleRule::kMse:
      return "mse";
    case ScaleRule::kFourOverSix:
      return "4over6";
  }
  return "";
}

QuantizePlan plan_quantize(const Checkpoint& checkpoint, const QuantizeOptions& options) {
  return Planner(checkpoint, options).plan();
}

std::vector<std::string> nvfp4_matrix_names(const QuantizePlan& plan) {
  std::vector<std::string> names;
  for (const MatrixJob& job : plan.jobs)
    if (job.action == MatrixAction::kEncodeNvfp4 || job.action == MatrixAction::kCastMxfp4 ||
        job.action == MatrixAction::kRenameNvfp4 || (job.action == MatrixAction::kCopy && is_nvfp4(job.matrix.format)))
      names.push_back(job.matrix.name);
  return names;
}

bool has_fp8_matrices(const QuantizePlan& plan) {
  for (const OutputShard& shard : plan.shards)
    for (const OutputTensor& tensor : shard.tensors)
      if (tensor.spec.dtype == DType::kF8E4M3 && tensor.spec.name.ends_with(".weight")) return true;
  return false;
}

}  // namespace dsv4
