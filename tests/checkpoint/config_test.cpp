// Configurations that must parse, and the message for each that must not.
#include "checkpoint/config.h"

#include "checkpoint_test_util.h"

namespace dsv4 {
namespace {

ModelConfig parse(const Json& json) { return parse_model_config(json, "config.json"); }

// Changes one key; null removes nothing, it counts as absent.
Json changed(const char* key, Json value) {
  Json config = tiny_config();
  config[key] = std::move(value);
  return config;
}
void expect_refused(const char* key, Json value, std::initializer_list<std::string_view> parts) {
  SCOPED_TRACE(fmt::format("{} = {}", key, value.dump()));
  const Json config = changed(key, std::move(value));
  expect_bad_input({"config.json"}, [&] { parse(config); });
  expect_bad_input(parts, [&] { parse(config); });
}

TEST(Config, DemoShapeIsReadCompletely) {
  const ModelConfig c = parse(synth_shape_config("demo"));
  EXPECT_EQ(c.vocab_size, 4096);
  EXPECT_EQ(c.hidden, 256);
  EXPECT_EQ(c.num_layers, 6);
  EXPECT_EQ(c.num_heads, 4);
  EXPECT_EQ(c.head_dim, 512);
  EXPECT_EQ(c.rope_dim, 64);
  EXPECT_EQ(c.nope_dim(), 448);
  EXPECT_EQ(c.q_lora_rank, 128);
  EXPECT_EQ(c.o_lora_rank, 128);
  EXPECT_EQ(c.o_groups, 2);
  EXPECT_EQ(c.moe_inter, 128);
  EXPECT_EQ(c.num_experts, 24);
  EXPECT_EQ(c.num_shared_experts, 1);
  EXPECT_EQ(c.num_topk, 4);
  EXPECT_EQ(c.num_hash_layers, 2);
  EXPECT_FLOAT_EQ(c.routed_scaling_factor, 1.5f);
  EXPECT_TRUE(c.norm_topk_prob);
  EXPECT_FLOAT_EQ(c.swiglu_limit, 10.0f);
  EXPECT_EQ(c.window_len, 128);
  EXPECT_EQ(c.index_num_heads, 8);
  EXPECT_EQ(c.index_head_dim, 128);
  EXPECT_EQ(c.index_topk, 64);
  EXPECT_EQ(c.num_hc, 4);
  EXPECT_EQ(c.hc_sinkhorn_iters, 20);
  EXPECT_FLOAT_EQ(c.hc_eps, 1e-6f);
  EXPECT_FLOAT_EQ(c.rms_norm_eps, 1e-6f);
  EXPECT_EQ(c.rope.theta, 10000);
  EXPECT_EQ(c.rope.compress_theta, 160000);
  EXPECT_EQ(c.rope.factor, 16);
  EXPECT_EQ(c.rope.original_max_position, 65536);
  EXPECT_EQ(c.rope.beta_fast, 32);
  EXPECT_EQ(c.rope.beta_slow, 1);
  EXPECT_EQ(c.max_position, 1048576);
  EXPECT_EQ(c.compress_ratios, (std::vector<int>{0, 0, 4, 128, 4, 128}));
  EXPECT_EQ(c.bos_token_id, 0);
  EXPECT_EQ(c.eos_token_ids, (std::vector<int64_t>{1}));
  EXPECT_EQ(c.layer_kind(1), LayerKind::kWindow);
  EXPECT_EQ(c.layer_kind(2), LayerKind::kCsa);
  EXPECT_EQ(c.layer_kind(3), LayerKind::kHca);
  EXPECT_TRUE(c.is_hash_layer(1));
  EXPECT_FALSE(c.is_hash_layer(2));
}

TEST(Config, ReleasedShapesAreAccepted) {
  const ModelConfig flash = parse(synth_shape_config("flash"));
  int csa = 0, hca = 0;
  for (int layer = 0; layer < flash.num_layers; ++layer) {
    csa += flash.layer_kind(layer) == LayerKind::kCsa;
    hca += flash.layer_kind(layer) == LayerKind::kHca;
  }
  EXPECT_EQ(csa, 21);  // spec 1.2
  EXPECT_EQ(hca, 20);
  const ModelConfig pro = parse(synth_shape_config("pro"));
  csa = hca = 0;
  for (int layer = 0; layer < pro.num_layers; ++layer) {
    csa += pro.layer_kind(layer) == LayerKind::kCsa;
    hca += pro.layer_kind(layer) == LayerKind::kHca;
  }
  EXPECT_EQ(csa, 30);
  EXPECT_EQ(hca, 31);
}

TEST(Config, RatioListIsSlicedToTheMainLayers) {
  EXPECT_EQ(parse(changed("compress_ratios", {0, 4, 8, 4, 0, 0, 0})).compress_ratios, (std::vector<int>{0, 4, 8, 4}));
  expect_refused("compress_ratios", {0, 4, 8}, {"compress_ratios has 3 entries", "num_hidden_layers = 4"});
  expect_refused("compress_ratios", {0, 4, -8, 4}, {"compress_ratios[2]", "-8"});
  expect_refused("compress_ratios", {0, 4, 8, 4, "x"}, {"compress_ratios[4]", "\"x\""});
  expect_refused("compress_ratios", {0, 4, 8, 65537}, {"compress_ratios[3]", "65537"});
  expect_refused("compress_ratios", "4", {"compress_ratios", "list"});
  expect_refused("compress_ratios", nullptr, {"compress_ratios is missing"});
}

TEST(Config, IndexerKeysAreNeededOnlyByCsaLayers) {
  Json config = changed("compress_ratios", {0, 128, 1, 2});
  for (const char* key : {"index_n_heads", "index_head_dim", "index_topk"}) config.erase(key);
  const ModelConfig c = parse(config);
  EXPECT_EQ(c.index_topk, 0);
  EXPECT_EQ(c.layer_kind(2), LayerKind::kHca);
  expect_refused("index_topk", nullptr, {"index_topk is missing"});
  expect_refused("index_head_dim", 48, {"index_head_dim = 48", "power of two"});
  expect_refused("index_head_dim", 8, {"index_head_dim = 8", "qk_rope_head_dim = 16"});
}

TEST(Config, EveryDimensionRefusesZeroNegativeHugeAndOtherTypes) {
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
                          "qk_rope_head_dim", "q_lora_rank", "o_lora_rank", "o_groups", "moe_intermediate_size",
                          "n_routed_experts", "num_experts_per_tok", "sliding_window", "index_n_heads",
                          "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings"}) {
    for (const Json& value :
         {Json(0), Json(-1), Json(-9223372036854775807), Json(9223372036854775807), Json(UINT64_MAX), Json(16.0),
          Json(1e300), Json("16"), Json(true), Json::array(), Json::object()})
      expect_refused(key, value, {key, "integer from"});
    expect_refused(key, nullptr, {key, "missing"});
  }
  for (const char* key :
       {"n_shared_experts", "num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id"})
    for (const Json& value : {Json(-1), Json(9223372036854775807), Json(0.5), Json("x"), Json(false)})
      expect_refused(key, value, {key, "integer from"});
  for (const char* key :
       {"routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta"})
    for (const Json& value : {Json(-1), Json(-0.5), Json(1e300), Json("x"), Json(true)})
      expect_refused(key, value, {key, "number from"});
}

TEST(Config, NumbersThatJsonCannotHoldAreRefused) {
  for (const char* text :
       {R"({"hc_eps": NaN})", R"({"hc_eps": Infinity})", R"({"hc_eps": 1e999})", R"({"hidden_size": 0x10})"})
    expect_bad_input({"config.json", "invalid JSON"}, [&] { parse_json(text, "config.json"); });
  // nlohmann reads an integer beyond 64 bits as a floating-point number: a wrong type here.
  Json config = tiny_config();
  config["hidden_size"] = parse_json("99999999999999999999999999", "x");
  expect_bad_input({"hidden_size", "integer"}, [&] { parse(config); });
}

TEST(Config, RelationsBetweenKeysAreChecked) {
  expect_refused("head_dim", 16, {"head_dim = 16", "qk_rope_head_dim = 16"});
  expect_refused("qk_rope_head_dim", 15, {"qk_rope_head_dim = 15", "odd"});
  expect_refused("o_groups", 4, {"num_attention_heads = 6", "o_groups = 4"});
  expect_refused("num_experts_per_tok", 6, {"num_experts_per_tok = 6", "n_routed_experts = 5"});
  expect_refused("num_hash_layers", 5, {"num_hash_layers = 5", "num_hidden_layers = 4"});
  expect_refused("hidden_size", 90, {"hidden_size = 90", "16"});
  expect_refused("moe_intermediate_size", 40, {"moe_intermediate_size = 40", "16"});
  expect_refused("q_lora_rank", 84, {"q_lora_rank = 84", "16"});
  expect_refused("o_lora_rank", 24, {"o_groups * o_lora_rank = 72", "16"});
  expect_refused("head_dim", 50, {"num_attention_heads / o_groups * head_dim = 100", "16"});
  expect_refused("eos_token_id", {1, 320}, {"eos_token_id[1]", "319"});
  expect_refused("bos_token_id", 320, {"bos_token_id", "319"});
  expect_refused("hc_mult", 9, {"hc_mult", "8"});
}

TEST(Config, ProductsAreBounded) {
  Json config = tiny_config();
  config["n_routed_experts"] = 65536;
  config["num_hidden_layers"] = 1024;
  config["compress_ratios"] = std::vector<int>(1024, 0);
  expect_bad_input({"num_hidden_layers * n_routed_experts = 67108864"}, [&] { parse(config); });
  config = tiny_config();
  config["hidden_size"] = 1 << 20;
  config["moe_intermediate_size"] = 1 << 20;
  config["n_shared_experts"] = 64;
  config["n_routed_experts"] = 60000;
  expect_bad_input({"n_shared_experts * moe_intermediate_size * hidden_size = 70368744177664", "3 * num_hidden_layers"},
                   [&] { parse(config); });
}

TEST(Config, OnlyTheKnownArchitectureIsAccepted) {
  expect_refused("model_type", "llama", {"model_type", "deepseek_v4", "llama"});
  expect_refused("model_type", nullptr, {"model_type"});
  expect_refused("model_type", 4, {"model_type", "string"});
  expect_refused("num_key_value_heads", 2, {"num_key_value_heads", "1", "2"});
  expect_refused("scoring_func", "softmax", {"scoring_func", "sqrtsoftplus", "softmax"});
  expect_refused("topk_method", "greedy", {"topk_method", "noaux_tc"});
  expect_refused("hidden_act", "gelu", {"hidden_act", "silu"});
  expect_refused("tie_word_embeddings", true, {"tie_word_embeddings"});
  expect_refused("attention_bias", true, {"attention_bias"});
  expect_refused("norm_topk_prob", 1, {"norm_topk_prob", "true or false"});
}

TEST(Config, RopeScalingIsReadOrAbsent) {
  EXPECT_EQ(parse(changed("rope_scaling", nullptr)).rope.factor, 1.0) << "no scaling";
  expect_refused("rope_scaling", {{"type", "linear"}, {"factor", 2}, {"original_max_position_embeddings", 4096}},
                 {"rope_scaling.type", "yarn", "linear"});
  expect_refused("rope_scaling", {{"type", "yarn"}},
                 {"rope_scaling.factor is missing", "rope_scaling.original_max_position_embeddings"});
  expect_refused("rope_scaling", {{"type", "yarn"}, {"factor", 0}, {"original_max_position_embeddings", 0}},
                 {"rope_scaling.factor", "rope_scaling.original_max_position_embeddings"});
  expect_refused(
      "rope_scaling",
      {{"type", "yarn"}, {"factor", 2}, {"original_max_position_embeddings", 4096}, {"beta_fast", 1}, {"beta_slow", 2}},
      {"beta_fast = 1", "beta_slow = 2"});
  expect_refused("rope_scaling", 3, {"rope_scaling", "object"});
  expect_refused("rope_theta", 1, {"rope_theta"});
}

TEST(Config, AllProblemsAreReportedAtOnce) {
  Json config = tiny_config();
  config["hidden_size"] = -96;
  config["o_groups"] = 4;
  config["head_dim"] = "48";
  config.erase("q_lora_rank");
  config["compress_ratios"] = {0, 4};
  expect_bad_input(
      {"5 problems", "hidden_size", "o_groups = 4", "head_dim", "q_lora_rank is missing", "compress_ratios has 2"},
      [&] { parse(config); });
}

TEST(Config, HostileValuesArePrintedShort) {
  const Json config = changed("hidden_size", std::string(1 << 20, 'x'));
  try {
    parse(config);
    FAIL();
  } catch (const Error& error) {
    EXPECT_LT(std::string_view(error.what()).size(), 400u);
  }
}

TEST(Config, EveryProperPrefixOfTheFileIsRefused) {
  const std::string text = tiny_config().dump();
  for (size_t length = 0; length < text.size(); ++length)
    expect_bad_input({"config.json", "invalid JSON"},
                     [&] { parse(parse_json(text.substr(0, length), "config.json")); });
}

TEST(Config, RootMustBeAnObject) {
  for (const Json& root : {Json::array(), Json(3), Json("x"), Json(nullptr)})
    expect_bad_input({"config.json", "not a JSON object"}, [&] { parse(root); });
}

TEST(GenerationConfig, DefaultsAndLimits) {
  const GenerationDefaults none = parse_generation_defaults(Json::object(), "g");
  EXPECT_TRUE(none.do_sample);
  EXPECT_EQ(none.temperature, 1.0f);
  EXPECT_EQ(none.top_p, 1.0f);
  EXPECT_EQ(none.top_k, 0);
  const GenerationDefaults some =
      parse_generation_defaults({{"do_sample", false}, {"temperature", 0.5}, {"top_p", 0.25}, {"top_k", 9}}, "g");
  EXPECT_FALSE(some.do_sample);
  EXPECT_EQ(some.temperature, 0.5f);
  EXPECT_EQ(some.top_p, 0.25f);
  EXPECT_EQ(some.top_k, 9);
  expect_bad_input({"g:", "4 problems", "do_sample", "temperature", "top_p", "top_k"}, [] {
    parse_generation_defaults({{"do_sample", 1}, {"temperature", -1}, {"top_p", 0}, {"top_k", -1}}, "g");
  });
  expect_bad_input({"g:", "not a JSON object"}, [] { parse_generation_defaults(Json::array(), "g"); });
}

}  // namespace
}  // namespace dsv4
