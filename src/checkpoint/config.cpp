// Reading and judging config.json: first each key by itself, then what must hold between them.
#include "checkpoint/config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/math.h"

namespace dsv4 {
namespace {

// Values are printed into messages: a hostile file must not print a megabyte.
std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

// Typed access to the keys of one object; problems are collected, and a key with a problem reads as its lower bound.
class KeyReader {
 public:
  KeyReader(const Json& object, std::string prefix, std::vector<std::string>& problems)
      : object_(object), prefix_(std::move(prefix)), problems_(problems) {}

  // null counts as absent, as Hugging Face writes it.
  const Json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  int64_t integer(const char* key, int64_t min, int64_t max) {
    if (const Json* value = required(key)) return integer_value(*value, key, min, max);
    return min;
  }
  int64_t integer_or(const char* key, int64_t fallback, int64_t min, int64_t max) {
    const Json* value = find(key);
    return value == nullptr ? fallback : integer_value(*value, key, min, max);
  }
  double number(const char* key, double min, double max) {
    if (const Json* value = required(key)) return number_value(*value, key, min, max);
    return min;
  }
  double number_or(const char* key, double fallback, double min, double max) {
    const Json* value = find(key);
    return value == nullptr ? fallback : number_value(*value, key, min, max);
  }
  bool boolean_or(const char* key, bool fallback) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (value->is_boolean()) return value->get<bool>();
    problem("{} must be true or false, found {}", name(key), shown(*value));
    return fallback;
  }
  std::string text_or(const char* key, std::string fallback) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (value->is_string()) return value->get<std::string>();
    problem("{} must be a string, found {}", name(key), shown(*value));
    return fallback;
  }
  // If present, the key must have this one value: the engine knows no other.
  void must_be(const char* key, const Json& only) {
    const Json* value = find(key);
    if (value != nullptr && *value != only) problem("{} must be {}, found {}", name(key), only.dump(), shown(*value));
  }

  // True if none of these keys had a problem of its own: only then is a relation between them worth a message.
  bool good(std::initializer_list<std::string_view> keys) const {
    for (std::string_view key : keys)
      if (bad_keys_.contains(key)) return false;
    return true;
  }

  int64_t integer_value(const Json& value, const std::string& key, int64_t min, int64_t max) {
    std::optional<int64_t> number;
    if (value.is_number_unsigned()) {
      // Above int64: judged as the largest, which no caller's max reaches.
      const uint64_t wide = value.get<uint64_t>();
      number = wide > static_cast<uint64_t>(INT64_MAX) ? INT64_MAX : static_cast<int64_t>(wide);
    } else if (value.is_number_integer()) {
      number = value.get<int64_t>();
    }
    if (number && *number >= min && *number <= max) return *number;
    bad_keys_.insert(key);
    problem("{} must be an integer from {} to {}, found {}", name(key), min, max, shown(value));
    return min;
  }

  template <class... T>
  void problem(fmt::format_string<T...> format, T&&... args) {
    problems_.push_back(fmt::format(format, std::forward<T>(args)...));
  }

 private:
  std::string name(std::string_view key) const { return prefix_ + std::string(key); }

  const Json* required(const char* key) {
    const Json* value = find(key);
    if (value == nullptr) {
      bad_keys_.insert(key);
      problem("{} is missing", name(key));
    }
    return value;
  }
  double number_value(const Json& value, const char* key, double min, double max) {
    if (value.is_number()) {
      const double number = value.get<double>();
      if (std::isfinite(number) && number >= min && number <= max) return number;
    }
    problem("{} must be a number from {} to {}, found {}", name(key), min, max, shown(value));
    return min;
  }

  const Json& object_;
  std::string prefix_;
  std::vector<std::string>& problems_;
  std::set<std::string, std::less<>> bad_keys_;
};

RopeConfig read_rope(KeyReader& keys, std::vector<std::string>& problems) {
  RopeConfig rope;
  rope.theta = keys.number_or("rope_theta", rope.theta, 1.0, 1e12);
  rope.compress_theta = keys.number_or("compress_rope_theta", rope.compress_theta, 1.0, 1e12);
  if (rope.theta == 1.0 || rope.compress_theta == 1.0)
    keys.problem("rope_theta and compress_rope_theta must be above 1");
  const Json* scaling = keys.find("rope_scaling");
  if (scaling == nullptr) {
    rope.factor = 1;  // YaRN by a factor of 1 leaves every frequency as it is
    return rope;
  }
  if (!scaling->is_object()) {
    keys.problem("rope_scaling must be an object, found {}", shown(*scaling));
    return rope;
  }
  KeyReader inner(*scaling, "rope_scaling.", problems);
  inner.must_be("type", "yarn");
  inner.must_be("rope_type", "yarn");
  rope.factor = inner.number("factor", 1.0, 1e6);
  rope.original_max_position = inner.number("original_max_position_embeddings", 1.0, 1e12);
  rope.beta_fast = inner.number_or("beta_fast", rope.beta_fast, 1e-6, 1e6);
  rope.beta_slow = inner.number_or("beta_slow", rope.beta_slow, 1e-6, 1e6);
  if (rope.beta_fast < rope.beta_slow)
    inner.problem("rope_scaling.beta_fast = {} is below rope_scaling.beta_slow = {}", rope.beta_fast, rope.beta_slow);
  return rope;
}

std::vector<int> read_compress_ratios(KeyReader& keys, int num_layers) {
  std::vector<int> ratios;
  const Json* list = keys.find("compress_ratios");
  if (list == nullptr || !list->is_array()) {
    if (list == nullptr)
      keys.problem("compress_ratios is missing");
    else
      keys.problem("compress_ratios must be a list of integers, found {}", shown(*list));
    ratios.assign(static_cast<size_t>(num_layers), 0);
    return ratios;
  }
  if (list->size() < static_cast<size_t>(num_layers))
    keys.problem("compress_ratios has {} entries for num_hidden_layers = {}", list->size(), num_layers);
  // Entries after the main layers belong to the draft layers; they are judged too, then dropped.
  constexpr size_t kMaxEntries = 4096;
  if (list->size() > kMaxEntries)
    keys.problem("compress_ratios has {} entries, at most {} are accepted", list->size(), kMaxEntries);
  for (size_t i = 0; i < list->size() && i < kMaxEntries; ++i)
    ratios.push_back(
        static_cast<int>(keys.integer_value((*list)[i], fmt::format("compress_ratios[{}]", i), 0, 1 << 16)));
  ratios.resize(static_cast<size_t>(num_layers), 0);
  return ratios;
}

std::vector<int64_t> read_eos(KeyReader& keys, int64_t vocab_size) {
  const Json* value = keys.find("eos_token_id");
  if (value == nullptr) {
    keys.problem("eos_token_id is missing");
    return {};
  }
  if (!value->is_array()) return {keys.integer_value(*value, "eos_token_id", 0, vocab_size - 1)};
  std::vector<int64_t> ids;
  if (value->empty() || value->size() > 64)
    keys.problem("eos_token_id must list 1 to 64 token ids, found {}", shown(*value));
  for (size_t i = 0; i < value->size() && i < 64; ++i)
    ids.push_back(keys.integer_value((*value)[i], fmt::format("eos_token_id[{}]", i), 0, vocab_size - 1));
  return ids;
}

void read_indexer(KeyReader& keys, ModelConfig& config, bool required) {
  const auto read = [&](const char* key, int64_t max) {
    return static_cast<int>(required ? keys.integer(key, 1, max) : keys.integer_or(key, 0, 0, max));
  };
  config.index_num_heads = read("index_n_heads", 4096);
  config.index_head_dim = read("index_head_dim", 4096);
  config.index_topk = read("index_topk", 1 << 20);
}

// ---- relations between the keys ----

bool has_csa_layer(const std::vector<int>& ratios) {
  return std::find(ratios.begin(), ratios.end(), 4) != ratios.end();
}

void check_relations(const ModelConfig& c, KeyReader& keys) {
  if (c.rope_dim % 2 != 0) keys.problem("qk_rope_head_dim = {} is odd", c.rope_dim);
  if (keys.good({"head_dim", "qk_rope_head_dim"}) && c.head_dim <= c.rope_dim)
    keys.problem("head_dim = {} must be larger than qk_rope_head_dim = {}", c.head_dim, c.rope_dim);
  if (keys.good({"num_attention_heads", "o_groups"}) && c.num_heads % c.o_groups != 0)
    keys.problem("num_attention_heads = {} is not a multiple of o_groups = {}", c.num_heads, c.o_groups);
  if (keys.good({"num_experts_per_tok", "n_routed_experts"}) && c.num_topk > c.num_experts)
    keys.problem("num_experts_per_tok = {} is more than n_routed_experts = {}", c.num_topk, c.num_experts);
  if (keys.good({"num_hash_layers", "num_hidden_layers"}) && c.num_hash_layers > c.num_layers)
    keys.problem("num_hash_layers = {} is more than num_hidden_layers = {}", c.num_hash_layers, c.num_layers);
  if (has_csa_layer(c.compress_ratios) && keys.good({"index_head_dim", "qk_rope_head_dim"})) {
    if ((c.index_head_dim & (c.index_head_dim - 1)) != 0)
      keys.problem("index_head_dim = {} is not a power of two (the Hadamard rotation needs one)", c.index_head_dim);
    if (c.index_head_dim < c.rope_dim)
      keys.problem("index_head_dim = {} is smaller than qk_rope_head_dim = {}", c.index_head_dim, c.rope_dim);
  }

  // What is contracted in a GEMM is stored in groups of 16 once it is NVFP4.
  const auto contracted = [&keys](const char* name, int64_t size, std::initializer_list<std::string_view> factors) {
    if (keys.good(factors) && size % 16 != 0) keys.problem("{} = {} is not a multiple of 16", name, size);
  };
  contracted("hidden_size", c.hidden, {"hidden_size"});
  contracted("moe_intermediate_size", c.moe_inter, {"moe_intermediate_size"});
  contracted("q_lora_rank", c.q_lora_rank, {"q_lora_rank"});
  contracted("num_attention_heads / o_groups * head_dim", c.num_heads / c.o_groups * static_cast<int64_t>(c.head_dim),
             {"num_attention_heads", "o_groups", "head_dim"});
  contracted("o_groups * o_lora_rank", c.o_groups * c.o_lora_rank, {"o_groups", "o_lora_rank"});
}

// Factors are bounded one by one when read; the products that are allocated or stored are bounded here. A factor with a
// problem of its own counts as its lower bound.
void check_sizes(const ModelConfig& c, KeyReader& keys) {
  const auto bounded = [&keys](const char* name, std::initializer_list<int64_t> factors, int64_t max) {
    uint64_t value = 1;
    for (int64_t factor : factors) value = checked_mul(value, static_cast<uint64_t>(factor)).value_or(UINT64_MAX);
    if (value > static_cast<uint64_t>(max)) keys.problem("{} = {}, at most {} is accepted", name, value, max);
  };
  constexpr int64_t kMatrix = kMaxMatrixElements;
  bounded("vocab_size * hidden_size", {c.vocab_size, c.hidden}, kMatrix);
  bounded("num_attention_heads * head_dim * q_lora_rank", {c.num_heads, c.head_dim, c.q_lora_rank}, kMatrix);
  bounded("num_attention_heads * head_dim * o_lora_rank", {c.num_heads, c.head_dim, c.o_lora_rank}, kMatrix);
  bounded("o_groups * o_lora_rank * hidden_size", {c.o_groups, c.o_lora_rank, c.hidden}, kMatrix);
  bounded("n_shared_experts * moe_intermediate_size * hidden_size", {c.num_shared_experts, c.moe_inter, c.hidden},
          kMatrix);
  bounded("index_n_heads * index_head_dim * q_lora_rank", {c.index_num_heads, c.index_head_dim, c.q_lora_rank},
          kMatrix);
  bounded("num_hidden_layers * n_routed_experts", {c.num_layers, c.num_experts}, kMaxExpertsTimesLayers);
  bounded("3 * num_hidden_layers * n_routed_experts * moe_intermediate_size * hidden_size",
          {3, c.num_layers, c.num_experts, c.moe_inter, c.hidden}, kMaxModelParameters);
}

[[noreturn]] void throw_problems(const std::string& source, const std::vector<std::string>& problems) {
  throw_bad_input("{}: {} problem{} in the configuration:\n  {}", source, problems.size(),
                  problems.size() == 1 ? "" : "s", fmt::join(problems, "\n  "));
}

}  // namespace

LayerKind ModelConfig::layer_kind(int layer) const {
  DSV4_CHECK(layer >= 0 && layer < num_layers, "layer {} of {}", layer, num_layers);
  const int ratio = compress_ratios[static_cast<size_t>(layer)];
  if (ratio == 0) return LayerKind::kWindow;
  return ratio == 4 ? LayerKind::kCsa : LayerKind::kHca;
}

ModelConfig parse_model_config(const Json& json, const std::string& source) {
  if (!json.is_object()) throw_bad_input("{}: the configuration is not a JSON object", source);
  std::vector<std::string> problems;
  KeyReader keys(json, "", problems);

  // Anything the engine would compute differently is refused, not ignored.
  if (keys.text_or("model_type", "") != "deepseek_v4")
    keys.problem("model_type must be \"deepseek_v4\", found {}",
                 json.contains("model_type") ? shown(json["model_type"]) : "nothing");
  keys.must_be("num_key_value_heads", 1);
  keys.must_be("scoring_func", "sqrtsoftplus");
  keys.must_be("topk_method", "noaux_tc");
  keys.must_be("hidden_act", "silu");
  keys.must_be("tie_word_embeddings", false);
  keys.must_be("attention_bias", false);

  ModelConfig c;
  const auto small = [&keys](const char* key, int64_t min, int64_t max) {
    return static_cast<int>(keys.integer(key, min, max));
  };
  c.vocab_size = keys.integer("vocab_size", 1, 1 << 24);
  c.hidden = keys.integer("hidden_size", 1, 1 << 20);
  c.num_layers = small("num_hidden_layers", 1, 1024);
  c.num_heads = small("num_attention_heads", 1, 4096);
  c.head_dim = small("head_dim", 1, 8192);
  c.rope_dim = small("qk_rope_head_dim", 2, 4096);
  c.q_lora_rank = keys.integer("q_lora_rank", 1, 1 << 20);
  c.o_lora_rank = keys.integer("o_lora_rank", 1, 1 << 20);
  c.o_groups = small("o_groups", 1, 4096);
  c.moe_inter = keys.integer("moe_intermediate_size", 1, 1 << 20);
  c.num_experts = small("n_routed_experts", 1, 1 << 16);
  c.num_shared_experts = small("n_shared_experts", 0, 64);
  c.num_topk = small("num_experts_per_tok", 1, 1024);
  c.num_hash_layers = static_cast<int>(keys.integer_or("num_hash_layers", 0, 0, 1024));
  c.routed_scaling_factor = static_cast<float>(keys.number("routed_scaling_factor", 1e-6, 1e6));
  c.norm_topk_prob = keys.boolean_or("norm_topk_prob", true);
  c.swiglu_limit = static_cast<float>(keys.number("swiglu_limit", 0, 1e6));
  c.window_len = small("sliding_window", 1, 1 << 20);
  c.num_hc = small("hc_mult", 1, 8);
  c.hc_sinkhorn_iters = small("hc_sinkhorn_iters", 1, 1000);
  c.hc_eps = static_cast<float>(keys.number("hc_eps", 0, 1));
  c.rms_norm_eps = static_cast<float>(keys.number("rms_norm_eps", 1e-30, 1));
  c.rope = read_rope(keys, problems);
  c.max_position = keys.integer("max_position_embeddings", 1, 1ll << 40);
  c.compress_ratios = read_compress_ratios(keys, c.num_layers);
  c.num_mtp_layers = static_cast<int>(keys.integer_or("num_nextn_predict_layers", 0, 0, 64));
  c.bos_token_id = keys.integer("bos_token_id", 0, c.vocab_size - 1);
  c.eos_token_ids = read_eos(keys, c.vocab_size);
  c.expert_dtype = keys.text_or("expert_dtype", "");
  read_indexer(keys, c, has_csa_layer(c.compress_ratios));

  check_relations(c, keys);
  check_sizes(c, keys);
  if (!problems.empty()) throw_problems(source, problems);
  return c;
}

GenerationDefaults parse_generation_defaults(const Json& json, const std::string& source) {
  if (!json.is_object()) throw_bad_input("{}: the generation configuration is not a JSON object", source);
  std::vector<std::string> problems;
  KeyReader keys(json, "", problems);
  GenerationDefaults defaults;
  defaults.do_sample = keys.boolean_or("do_sample", defaults.do_sample);
  defaults.temperature = static_cast<float>(keys.number_or("temperature", defaults.temperature, 0, 100));
  defaults.top_p = static_cast<float>(keys.number_or("top_p", defaults.top_p, 1e-6, 1));
  defaults.top_k = static_cast<int>(keys.integer_or("top_k", defaults.top_k, 0, 1 << 24));
  if (!problems.empty()) throw_problems(source, problems);
  return defaults;
}

}  // namespace dsv4
