// Reading every tensor of the model by its official name (spec 2.7, 3.10, 4.3).
#include "model/weights.h"

#include "base/check.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/stored_matrix.h"
#include "model/stored_weight.h"

namespace dsv4 {
namespace {

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, WeightArena& arena)
      : checkpoint_(checkpoint), config_(checkpoint.config()), arena_(arena) {}

  Weight matrix(const std::string& name) const { return make_weight(checkpoint_.matrix(name), arena_); }
  std::vector<float> floats(const std::string& name) const { return to_floats(checkpoint_.at(name), name); }

  HcWeights hyper_connection(const std::string& prefix) const {
    return {floats(prefix + "_fn"), floats(prefix + "_scale"), floats(prefix + "_base")};
  }

  LayerWeights layer(int idx) const {
    const std::string prefix = fmt::format("layers.{}.", idx);
    LayerWeights layer;
    layer.hc_attn = hyper_connection(prefix + "hc_attn");
    layer.hc_ffn = hyper_connection(prefix + "hc_ffn");
    layer.attn_norm = floats(prefix + "attn_norm.weight");
    layer.ffn_norm = floats(prefix + "ffn_norm.weight");
    layer.attn = attention(prefix + "attn.", config_.layer_kind(idx));
    layer.ffn = ffn(prefix + "ffn.", config_.is_hash_layer(idx));
    return layer;
  }

 private:
  CompressorWeights compressor(const std::string& prefix) const {
    return {matrix(prefix + "wkv"), matrix(prefix + "wgate"), floats(prefix + "ape"), floats(prefix + "norm.weight")};
  }

  AttentionWeights attention(const std::string& prefix, LayerKind kind) const {
    AttentionWeights attn;
    attn.wq_a = matrix(prefix + "wq_a");
    attn.wq_b = matrix(prefix + "wq_b");
    attn.wkv = matrix(prefix + "wkv");
    attn.wo_b = matrix(prefix + "wo_b");
    const Weight wo_a = matrix(prefix + "wo_a");
    for (int group = 0; group < config_.o_groups; ++group)
      attn.wo_a.push_back(slice_rows(wo_a, group * config_.o_lora_rank, config_.o_lora_rank, arena_));
    attn.q_norm = floats(prefix + "q_norm.weight");
    attn.kv_norm = floats(prefix + "kv_norm.weight");
    attn.sink_logit = floats(prefix + "attn_sink");
    if (kind != LayerKind::kWindow)
      attn.compressor = std::make_unique<CompressorWeights>(compressor(prefix + "compressor."));
    if (kind == LayerKind::kCsa)
      attn.indexer = std::make_unique<IndexerWeights>(IndexerWeights{matrix(prefix + "indexer.wq_b"),
                                                                     matrix(prefix + "indexer.weights_proj"),
                                                                     compressor(prefix + "indexer.compressor.")});
    return attn;
  }

  ExpertWeights expert(const std::string& prefix) const {
    return {matrix(prefix + "w1"), matrix(prefix + "w3"), matrix(prefix + "w2")};
  }

  FfnWeights ffn(const std::string& prefix, bool hashed) const {
    FfnWeights ffn;
    ffn.gate = matrix(prefix + "gate");
    if (hashed) {
      ffn.hash_table = hash_table(prefix + "gate.tid2eid");
    } else {
      ffn.gate_bias = floats(prefix + "gate.bias");
    }
    for (int e = 0; e < config_.num_experts; ++e)
      ffn.experts.push_back(expert(fmt::format("{}experts.{}.", prefix, e)));
    if (config_.num_shared_experts > 0)
      ffn.shared = std::make_unique<ExpertWeights>(expert(prefix + "shared_experts."));
    return ffn;
  }

  std::vector<int32_t> hash_table(const std::string& name) const {
    const TensorView& view = checkpoint_.at(name);
    validate_expert_table(checkpoint_.file_of(name) + ": " + name, view, config_.num_experts);
    std::vector<int32_t> table(static_cast<size_t>(view.elements()));
    for (size_t i = 0; i < table.size(); ++i)
      table[i] = static_cast<int32_t>(view.dtype == DType::kI64 ? view.as<int64_t>()[i] : view.as<int32_t>()[i]);
    return table;
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  WeightArena& arena_;
};

}  // namespace

std::vector<Weight*> all_matrices(ModelWeights& weights) {
  std::vector<Weight*> list;
  const auto add = [&](auto&... weight) { (list.push_back(&weight), ...); };
  const auto add_expert = [&](ExpertWeights& expert) { add(expert.w1, expert.w3, expert.w2); };
  for (LayerWeights& layer : weights.layers) {
    AttentionWeights& attn = layer.attn;
    add(attn.wq_a, attn.wq_b, attn.wkv);
    if (attn.indexer)
      add(attn.indexer->wq_b, attn.indexer->weights_proj, attn.indexer->compressor.wkv, attn.indexer->compressor.wgate);
    if (attn.compressor) add(attn.compressor->wkv, attn.compressor->wgate);
    for (Weight& group : attn.wo_a) add(group);
    add(attn.wo_b, layer.ffn.gate);
    for (ExpertWeights& expert : layer.ffn.experts) add_expert(expert);
    if (layer.ffn.shared) add_expert(*layer.ffn.shared);
  }
  add(weights.head);
  return list;
}

ModelWeights load_weights(const Checkpoint& checkpoint, const CpuContext& context) {
  const ModelConfig& config = checkpoint.config();
  WeightArena arena;
  const Loader loader(checkpoint, arena);
  ModelWeights weights;
  weights.embed = loader.matrix("embed");
  weights.head = loader.matrix("head");
  weights.hc_head = loader.hyper_connection("hc_head");
  weights.norm = loader.floats("norm.weight");
  weights.layers.resize(static_cast<size_t>(config.num_layers));
  context.pool.parallel_for(config.num_layers, [&](int64_t idx) {
    weights.layers[static_cast<size_t>(idx)] = loader.layer(static_cast<int>(idx));
  });
  const YarnParams yarn{config.rope.factor, config.rope.original_max_position, config.rope.beta_fast,
                        config.rope.beta_slow};
  weights.window_rope = make_rope_freqs(config.rope_dim, config.rope.theta, nullptr);
  weights.compress_rope = make_rope_freqs(config.rope_dim, config.rope.compress_theta, &yarn);
  weights.owned = arena.take();
  return weights;
}

}  // namespace dsv4
