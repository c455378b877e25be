// The tensor list of spec 3.10, 4.3, 2.7 as a function of the configuration, and the comparison with a folder.
#include "checkpoint/inventory.h"

#include <array>
#include <unordered_set>

#include "base/check.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/stored_matrix.h"

namespace dsv4 {
namespace {

class Lister {
 public:
  explicit Lister(std::vector<LogicalTensor>& out) : out_(out) {}

  void enter(std::string prefix, int layer) {
    prefix_ = std::move(prefix);
    layer_ = layer;
  }
  void matrix(std::string_view name, TensorRole role, int64_t rows, int64_t cols) {
    add(name, role, TensorClass::kQuantisable, {rows, cols});
  }
  void plain(std::string_view name, TensorRole role, int64_t rows, int64_t cols) {
    add(name, role, TensorClass::kPlainMatrix, {rows, cols});
  }
  void norm(std::string_view name, int64_t size) { add(name, TensorRole::kNorm, TensorClass::kNorm, {size}); }
  void f32(std::string_view name, TensorRole role, Shape shape) {
    add(name, role, TensorClass::kF32, std::move(shape));
  }
  void add(std::string_view name, TensorRole role, TensorClass tensor_class, Shape shape) {
    out_.push_back({prefix_ + std::string(name), role, tensor_class, std::move(shape), layer_});
  }

 private:
  std::vector<LogicalTensor>& out_;
  std::string prefix_;
  int layer_ = -1;
};

// dim: width of the entries this compressor makes.
void list_compressor(Lister& list, const std::string& prefix, TensorRole role, int ratio, int64_t dim, int64_t hidden) {
  const int64_t width = ratio == 4 ? 2 * dim : dim;
  list.plain(prefix + "wkv", role, width, hidden);
  list.plain(prefix + "wgate", role, width, hidden);
  list.f32(prefix + "ape", role, {ratio, width});
  list.norm(prefix + "norm.weight", dim);
}

void list_attention(Lister& list, const ModelConfig& c, int layer) {
  const int64_t heads_dim = static_cast<int64_t>(c.num_heads) * c.head_dim;
  const TensorRole role = TensorRole::kAttention;
  list.f32("attn.attn_sink", role, {c.num_heads});
  list.matrix("attn.wq_a", role, c.q_lora_rank, c.hidden);
  list.norm("attn.q_norm.weight", c.q_lora_rank);
  list.matrix("attn.wq_b", role, heads_dim, c.q_lora_rank);
  list.matrix("attn.wkv", role, c.head_dim, c.hidden);
  list.norm("attn.kv_norm.weight", c.head_dim);
  list.matrix("attn.wo_a", role, c.o_groups * c.o_lora_rank, heads_dim / c.o_groups);
  list.matrix("attn.wo_b", role, c.hidden, c.o_groups * c.o_lora_rank);
  const int ratio = c.compress_ratios[static_cast<size_t>(layer)];
  if (ratio == 0) return;
  list_compressor(list, "attn.compressor.", TensorRole::kCompressor, ratio, c.head_dim, c.hidden);
  if (c.layer_kind(layer) != LayerKind::kCsa) return;
  list.matrix("attn.indexer.wq_b", TensorRole::kIndexer, static_cast<int64_t>(c.index_num_heads) * c.index_head_dim,
              c.q_lora_rank);
  list.plain("attn.indexer.weights_proj", TensorRole::kIndexer, c.index_num_heads, c.hidden);
  list_compressor(list, "attn.indexer.compressor.", TensorRole::kIndexer, ratio, c.index_head_dim, c.hidden);
}

void list_expert(Lister& list, const std::string& prefix, TensorRole role, int64_t inter, int64_t hidden) {
  list.matrix(prefix + "w1", role, inter, hidden);
  list.matrix(prefix + "w2", role, hidden, inter);
  list.matrix(prefix + "w3", role, inter, hidden);
}

void list_moe(Lister& list, const ModelConfig& c, int layer) {
  list.plain("ffn.gate", TensorRole::kRouter, c.num_experts, c.hidden);
  if (c.is_hash_layer(layer))
    list.add("ffn.gate.tid2eid", TensorRole::kRouter, TensorClass::kExpertTable, {c.vocab_size, c.num_topk});
  else
    list.f32("ffn.gate.bias", TensorRole::kRouter, {c.num_experts});
  for (int expert = 0; expert < c.num_experts; ++expert)
    list_expert(list, fmt::format("ffn.experts.{}.", expert), TensorRole::kRoutedExpert, c.moe_inter, c.hidden);
  if (c.num_shared_experts > 0)
    list_expert(list, "ffn.shared_experts.", TensorRole::kSharedExpert, c.num_shared_experts * c.moe_inter, c.hidden);
}

void list_hyper_connection(Lister& list, const std::string& prefix, int64_t outputs, int64_t scales, int64_t width) {
  list.f32(prefix + "fn", TensorRole::kHyperConnection, {outputs, width});
  list.f32(prefix + "base", TensorRole::kHyperConnection, {outputs});
  list.f32(prefix + "scale", TensorRole::kHyperConnection, {scales});
}

bool dtype_allowed(TensorClass tensor_class, DType dtype) {
  switch (tensor_class) {
    case TensorClass::kNorm:
      return dtype == DType::kBf16 || dtype == DType::kF32;
    case TensorClass::kF32:
      return dtype == DType::kF32;
    case TensorClass::kExpertTable:
      return dtype == DType::kI64 || dtype == DType::kI32;
    case TensorClass::kQuantisable:
    case TensorClass::kPlainMatrix:
      return true;  // judged by StoredFormat
  }
  return false;
}

std::string_view allowed_dtypes(TensorClass tensor_class) {
  switch (tensor_class) {
    case TensorClass::kF32:
      return "F32";
    case TensorClass::kExpertTable:
      return "I64 or I32";
    default:
      return "BF16 or F32";
  }
}

}  // namespace

std::string_view tensor_role_name(TensorRole role) {
  constexpr std::array<std::string_view, kNumTensorRoles> kNames{
      "embedding", "head",   "norms",         "hyper-connections", "attention", "compressor",
      "indexer",   "router", "shared expert", "routed experts",    "mtp"};
  return kNames[static_cast<size_t>(role)];
}

std::vector<LogicalTensor> list_tensors(const ModelConfig& c) {
  std::vector<LogicalTensor> tensors;
  Lister list(tensors);
  const int64_t streams = c.num_hc;
  list.plain("embed", TensorRole::kEmbedding, c.vocab_size, c.hidden);
  for (int layer = 0; layer < c.num_layers; ++layer) {
    list.enter(fmt::format("layers.{}.", layer), layer);
    list_hyper_connection(list, "hc_attn_", streams * (2 + streams), 3, streams * c.hidden);
    list.norm("attn_norm.weight", c.hidden);
    list_attention(list, c, layer);
    list_hyper_connection(list, "hc_ffn_", streams * (2 + streams), 3, streams * c.hidden);
    list.norm("ffn_norm.weight", c.hidden);
    list_moe(list, c, layer);
  }
  list.enter("", -1);
  list_hyper_connection(list, "hc_head_", streams, 1, streams * c.hidden);
  list.norm("norm.weight", c.hidden);
  list.plain("head", TensorRole::kHead, c.vocab_size, c.hidden);
  return tensors;
}

void check_inventory(const Checkpoint& checkpoint, ProblemList& problems) {
  std::unordered_set<std::string> used;
  for (const LogicalTensor& expected : list_tensors(checkpoint.config())) {
    if (expected.is_matrix()) {
      const MatrixSearch search = search_matrix(checkpoint, expected.name);
      used.insert(search.tensor_names.begin(), search.tensor_names.end());
      if (!search.problem.empty()) {
        problems.add(search.tensor_names.empty()
                         ? fmt::format("{}, shape {}", search.problem, to_string(expected.shape))
                         : search.problem);
        continue;
      }
      const StoredMatrix& found = search.matrix;
      if (Shape{found.rows, found.cols} != expected.shape)
        problems.add(fmt::format("{}: logical shape [{}, {}] ({}), expected {}", expected.name, found.rows, found.cols,
                                 stored_format_name(found.format), to_string(expected.shape)));
      if (expected.tensor_class == TensorClass::kPlainMatrix && found.format != StoredFormat::kBf16 &&
          found.format != StoredFormat::kF32)
        problems.add(
            fmt::format("{}: stored as {}, expected BF16 or F32", expected.name, stored_format_name(found.format)));
      continue;
    }
    const TensorView* found = checkpoint.find(expected.name);
    if (found == nullptr) {
      problems.add(fmt::format("missing tensor {}, shape {}", expected.name, to_string(expected.shape)));
      continue;
    }
    used.insert(expected.name);
    if (found->shape != expected.shape)
      problems.add(
          fmt::format("{}: shape {}, expected {}", expected.name, to_string(found->shape), to_string(expected.shape)));
    if (!dtype_allowed(expected.tensor_class, found->dtype))
      problems.add(fmt::format("{}: dtype {}, expected {}", expected.name, dtype_name(found->dtype),
                               allowed_dtypes(expected.tensor_class)));
  }
  for (const auto& file : checkpoint.files())
    for (const auto& [name, tensor] : file->tensors())
      if (!is_mtp_tensor(name) && !used.contains(name))
        problems.add(fmt::format("unexpected tensor {} ({} {}) in {}", name, dtype_name(tensor.dtype),
                                 to_string(tensor.shape), file->path()));
}

}  // namespace dsv4
