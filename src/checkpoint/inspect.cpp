// Measuring a folder: one pass over the logical tensors, one over what the files hold.
#include "checkpoint/inspect.h"

#include <fmt/format.h>

#include <set>

#include "base/math.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/stored_matrix.h"
#include "codec/fp8_block.h"

namespace dsv4 {
namespace {

constexpr std::array<int64_t, 3> kContexts{4096, 65536, 1 << 20};

// Row sizes as src/ops/attention/kv_view.h lays rows out (a layer above this one).
struct NamedBytes {
  const char* name;
  int64_t bytes;
};
std::array<NamedBytes, 3> row_formats(const ModelConfig& c) {
  const int64_t nope = c.nope_dim();
  const int64_t rope_bytes = 2 * c.rope_dim;
  return {NamedBytes{"bf16", 2 * c.head_dim},
          NamedBytes{"fp8", nope + rope_bytes + round_up(ceil_div(nope, kFp8KvBlock), 8)},
          NamedBytes{"nvfp4", nope / 2 + rope_bytes + round_up(ceil_div(nope, kNvfp4GroupSize), 8)}};
}
std::array<NamedBytes, 3> index_formats(const ModelConfig& c) {
  const int64_t dim = c.index_head_dim;
  return {NamedBytes{"bf16", 2 * dim}, NamedBytes{"fp8", dim + 4},
          NamedBytes{"fp4", dim / 2 + ceil_div(dim, kFp4IndexBlock)}};
}

// Value and gate in binary32, for both halves of an overlapping window.
int64_t compressor_state_bytes(int ratio, int64_t dim) {
  const int64_t overlap = ratio == 4 ? 2 : 1;
  return 2 * static_cast<int64_t>(sizeof(float)) * (overlap * ratio) * (overlap * dim);
}

KvCost kv_cost(const ModelConfig& c, const NamedBytes& row, const NamedBytes& key) {
  KvCost cost{.kv = row.name, .index = key.name, .row_bytes = row.bytes, .index_key_bytes = key.bytes};
  for (size_t i = 0; i < kContexts.size(); ++i) cost.at[i].context = kContexts[i];
  for (int layer = 0; layer < c.num_layers; ++layer) {
    cost.fixed_bytes += c.window_len * row.bytes;
    const int ratio = c.compress_ratios[static_cast<size_t>(layer)];
    if (ratio == 0) continue;
    const bool is_csa = c.layer_kind(layer) == LayerKind::kCsa;
    const int64_t entry_bytes = row.bytes + (is_csa ? key.bytes : 0);
    cost.fixed_bytes += compressor_state_bytes(ratio, c.head_dim);
    if (is_csa) cost.fixed_bytes += compressor_state_bytes(ratio, c.index_head_dim);
    cost.growing_bytes_per_token += static_cast<double>(entry_bytes) / ratio;
    for (KvCost::At& at : cost.at) at.bytes += at.context / ratio * entry_bytes;
  }
  for (KvCost::At& at : cost.at) at.bytes += cost.fixed_bytes;
  return cost;
}

// "ModelOpt NVFP4 experts, FP8 blocks": how the routed experts are stored, then the other quantisable matrices.
std::string variant_name(const std::set<StoredFormat>& experts, const std::set<StoredFormat>& dense) {
  const auto join = [](const std::set<StoredFormat>& formats) {
    std::string text;
    for (StoredFormat format : formats) text += (text.empty() ? "" : " and ") + std::string(stored_format_name(format));
    return text.empty() ? "none" : text;
  };
  const std::string stored = fmt::format("experts {}, dense {}", join(experts), join(dense));
  const auto only = [](const std::set<StoredFormat>& formats, StoredFormat format) {
    return formats == std::set<StoredFormat>{format};
  };
  const char* name = "mixed";
  if (only(experts, StoredFormat::kBf16) && only(dense, StoredFormat::kBf16))
    name = "BF16";
  else if (only(experts, StoredFormat::kMxfp4) && only(dense, StoredFormat::kFp8Block))
    name = "official";
  else if (only(experts, StoredFormat::kFp8Block) && only(dense, StoredFormat::kFp8Block))
    name = "official base (FP8)";
  else if (only(experts, StoredFormat::kNvfp4ModelOpt))
    name = "ModelOpt NVFP4";
  else if (only(experts, StoredFormat::kNvfp4Compressed))
    name = "compressed-tensors NVFP4";
  return fmt::format("{} ({})", name, stored);
}

class Inspection {
 public:
  explicit Inspection(const std::string& folder) : attempt_(try_open_checkpoint(folder)) {
    report_.folder = folder;
    report_.problems = attempt_.problems;
    report_.has_config = attempt_.has_config;
  }

  InspectReport run() {
    if (report_.has_config) {
      measure_config();
      measure_known_tensors();
    }
    measure_files();
    report_.usable = report_.problems.empty();
    return std::move(report_);
  }

 private:
  const Checkpoint& checkpoint() const { return attempt_.checkpoint; }

  void measure_config() {
    report_.config = checkpoint().config();
    for (int layer = 0; layer < report_.config.num_layers; ++layer)
      ++report_.num_layers_by_kind[static_cast<size_t>(report_.config.layer_kind(layer))];
    report_.parameters = count_parameters(report_.config);
    report_.kv = kv_costs(report_.config);
  }

  void count(const std::string& name, TensorRole role, std::string_view format) {
    const TensorView* tensor = checkpoint().find(name);
    if (tensor == nullptr || !counted_.insert(name).second) return;
    report_.bytes_by_role[static_cast<size_t>(role)] += tensor->bytes();
    report_.bytes_by_format[std::string(format)] += tensor->bytes();
  }

  void measure_known_tensors() {
    std::set<StoredFormat> experts, dense;
    for (const LogicalTensor& tensor : list_tensors(report_.config)) {
      if (!tensor.is_matrix()) {
        measure_plain_tensor(tensor);
        continue;
      }
      const MatrixSearch search = search_matrix(checkpoint(), tensor.name);
      const bool valid = search.problem.empty();  // otherwise it is in the list already
      for (const std::string& name : search.tensor_names)
        count(name, tensor.role, valid ? stored_format_name(search.matrix.format) : "not recognised");
      if (!valid) continue;
      if (const auto problem = find_scale_problem(search.matrix)) report_.problems.add(*problem);
      if (tensor.tensor_class == TensorClass::kQuantisable)
        (tensor.role == TensorRole::kRoutedExpert ? experts : dense).insert(search.matrix.format);
    }
    if (!checkpoint().files().empty()) report_.variant = variant_name(experts, dense);
  }

  void measure_plain_tensor(const LogicalTensor& expected) {
    const TensorView* tensor = checkpoint().find(expected.name);
    if (tensor == nullptr) return;
    count(expected.name, expected.role, dtype_name(tensor->dtype));
    const bool is_table = expected.tensor_class == TensorClass::kExpertTable && tensor->shape == expected.shape &&
                          (tensor->dtype == DType::kI64 || tensor->dtype == DType::kI32);
    if (!is_table) return;
    const std::string name = checkpoint().file_of(expected.name) + ": " + expected.name;
    if (const auto problem = find_expert_table_problem(name, *tensor, report_.config.num_experts))
      report_.problems.add(*problem);
  }

  void measure_files() {
    report_.num_files = static_cast<int>(checkpoint().files().size());
    for (const auto& file : checkpoint().files())
      for (const auto& [name, tensor] : file->tensors()) {
        ++report_.num_tensors;
        report_.bytes += tensor.bytes();
        if (counted_.contains(name)) continue;
        report_.bytes_by_format[std::string(dtype_name(tensor.dtype))] += tensor.bytes();
        if (is_mtp_tensor(name))
          report_.bytes_by_role[static_cast<size_t>(TensorRole::kMtp)] += tensor.bytes();
        else
          report_.unknown_bytes += tensor.bytes();
      }
  }

  CheckpointAttempt attempt_;
  InspectReport report_;
  std::set<std::string, std::less<>> counted_;
};

}  // namespace

std::vector<KvCost> kv_costs(const ModelConfig& config) {
  std::vector<KvCost> costs;
  for (const NamedBytes& row : row_formats(config))
    for (const NamedBytes& key : index_formats(config)) costs.push_back(kv_cost(config, row, key));
  return costs;
}

ParameterCount count_parameters(const ModelConfig& config) {
  ParameterCount count;
  int64_t routed = 0, embedding = 0;
  for (const LogicalTensor& tensor : list_tensors(config)) {
    if (tensor.tensor_class == TensorClass::kExpertTable) continue;
    const int64_t elements = num_elements(tensor.shape);
    count.total += elements;
    if (tensor.role == TensorRole::kRoutedExpert) routed += elements;
    if (tensor.role == TensorRole::kEmbedding) embedding += elements;
  }
  count.active = count.total - embedding - routed + routed / config.num_experts * config.num_topk;
  return count;
}

InspectReport inspect_checkpoint(const std::string& folder) { return Inspection(folder).run(); }

}  // namespace dsv4
