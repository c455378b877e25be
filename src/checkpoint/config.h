// config.json of a DeepSeek-V4 checkpoint, parsed and validated: spec section 1.
//
// Every dimension is checked for sign, size and consistency before anything is allocated; all problems are reported at once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"

namespace dsv4 {

enum class LayerKind : uint8_t {
  kWindow,  // compress ratio 0: sliding window only
  kCsa,     // ratio 4: overlapping compression, indexer selects top-k entries
  kHca,     // other ratios (128): compression without overlap, all entries attended
};

struct RopeConfig {
  double theta = 10000;            // ratio-0 layers
  double compress_theta = 160000;  // layers with compression, with YaRN below
  double factor = 16;
  double original_max_position = 65536;
  double beta_fast = 32;
  double beta_slow = 1;
};

struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden = 0;
  int num_layers = 0;
  int num_heads = 0;
  int head_dim = 0;
  int rope_dim = 0;
  int64_t q_lora_rank = 0;
  int64_t o_lora_rank = 0;
  int o_groups = 0;
  int64_t moe_inter = 0;
  int num_experts = 0;
  int num_shared_experts = 0;  // 0 or 1 expert of width num_shared_experts * moe_inter
  int num_topk = 0;            // experts per token
  int num_hash_layers = 0;
  float routed_scaling_factor = 1;
  bool norm_topk_prob = true;
  float swiglu_limit = 0;  // 0 = no clamp
  int window_len = 0;
  int index_num_heads = 0;
  int index_head_dim = 0;
  int index_topk = 0;
  int num_hc = 0;  // residual streams
  int hc_sinkhorn_iters = 0;
  float hc_eps = 0;
  float rms_norm_eps = 0;
  RopeConfig rope;
  int64_t max_position = 0;
  std::vector<int> compress_ratios;  // [num_layers]: 0, 4 or another ratio
  int num_mtp_layers = 0;
  int64_t bos_token_id = 0;
  std::vector<int64_t> eos_token_ids;
  std::string expert_dtype;  // as written, empty if absent

  LayerKind layer_kind(int layer) const;
  bool is_hash_layer(int layer) const { return layer < num_hash_layers; }
  int nope_dim() const { return head_dim - rope_dim; }
};

// source: name for messages. Throws one bad-input error that lists every problem, a line each.
ModelConfig parse_model_config(const Json& json, const std::string& source);

// Hard limits on what parse_model_config accepts, so that later arithmetic and the tensor list stay bounded.
constexpr int64_t kMaxMatrixElements = 1ll << 40;
constexpr int64_t kMaxModelParameters = 1ll << 48;
constexpr int64_t kMaxExpertsTimesLayers = 1ll << 18;

// generation_config.json: absent keys keep these defaults, absent file too.
struct GenerationDefaults {
  bool do_sample = true;
  float temperature = 1.0f;
  float top_p = 1.0f;
  int top_k = 0;
};
GenerationDefaults parse_generation_defaults(const Json& json, const std::string& source);

}  // namespace dsv4
