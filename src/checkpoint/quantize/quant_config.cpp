// quantization_config in the shape of ModelOpt's exports: what loaders of vLLM and SGLang look for.
#include "checkpoint/quantize/quant_config.h"

#include <nlohmann/json.hpp>

#include "codec/fp8_block.h"
#include "codec/nvfp4.h"

namespace dsv4 {
namespace {

using OrderedJson = nlohmann::ordered_json;

// Experts by layer ("layers.3.ffn.experts"), other matrices one by one.
OrderedJson quantized_layers(const QuantizePlan& plan) {
  OrderedJson layers = OrderedJson::object();
  for (const std::string& name : nvfp4_matrix_names(plan)) {
    constexpr std::string_view kExperts = ".ffn.experts";
    const size_t experts = name.find(std::string(kExperts) + ".");
    const std::string module = experts == std::string::npos ? name : name.substr(0, experts + kExperts.size());
    layers[module] = {{"quant_algo", "NVFP4"}, {"group_size", kNvfp4GroupSize}};
  }
  return layers;
}

// Modules that must not be taken for NVFP4.
OrderedJson excluded_modules(const QuantizePlan& plan) {
  bool has_dense = false;
  for (const std::string& name : nvfp4_matrix_names(plan)) has_dense |= name.find(".ffn.experts.") == std::string::npos;
  if (!has_dense) return {"*.attn.*", "*.ffn.shared_experts.*", "*.ffn.gate", "embed", "head", "mtp.*"};
  return {"*.attn.compressor.*",
          "*.attn.indexer.weights_proj",
          "*.attn.indexer.compressor.*",
          "*.ffn.gate",
          "embed",
          "head",
          "mtp.*"};
}

OrderedJson producer(const QuantizeOptions& options) {
  return {{"name", "modelopt"},
          {"version", "dsv4.cpp"},
          {"recipe", "nvfp4-experts, scale " + std::string(scale_rule_name(options.scale)) + ", dense " +
                         std::string(dense_format_name(options.dense))}};
}

bool fp8_scales_are_ue8m0(const QuantizePlan& plan) {
  for (const OutputShard& shard : plan.shards)
    for (const OutputTensor& tensor : shard.tensors)
      if (tensor.spec.name.ends_with(".scale") && tensor.spec.dtype != DType::kF8E8M0) return false;
  return true;
}

}  // namespace

std::string make_config_json(const std::string& source_text, const QuantizePlan& plan, const QuantizeOptions& options) {
  OrderedJson config = OrderedJson::parse(source_text);
  OrderedJson quantization = OrderedJson::object();
  const auto source = config.find("quantization_config");
  const bool source_is_fp8 =
      source != config.end() && source->is_object() && source->value("quant_method", OrderedJson()) == "fp8";
  if (has_fp8_matrices(plan)) {
    if (source_is_fp8) quantization = *source;
    quantization["quant_method"] = "fp8";
    quantization["activation_scheme"] = "dynamic";
    quantization["fmt"] = "e4m3";
    if (fp8_scales_are_ue8m0(plan)) quantization["scale_fmt"] = "ue8m0";
    quantization["weight_block_size"] = {kFp8WeightBlock, kFp8WeightBlock};
  } else {
    quantization["quant_method"] = "modelopt";
  }
  const OrderedJson fp4{{"num_bits", 4}, {"type", "float"}, {"group_size", kNvfp4GroupSize}, {"dynamic", false}};
  quantization["quant_algo"] = "MIXED_PRECISION";
  quantization["moe_quant_algo"] = "NVFP4";
  quantization["kv_cache_quant_algo"] = nullptr;
  quantization["group_size"] = kNvfp4GroupSize;
  quantization["config_groups"] = {
      {"group_0", {{"weights", fp4}, {"input_activations", fp4}, {"targets", OrderedJson::array({"Linear"})}}}};
  quantization["quantized_layers"] = quantized_layers(plan);
  quantization["ignore"] = excluded_modules(plan);
  quantization["producer"] = producer(options);
  config["quantization_config"] = std::move(quantization);
  config["expert_dtype"] = "fp4";
  return config.dump(2) + "\n";
}

std::string make_hf_quant_config_json(const QuantizePlan& plan, const QuantizeOptions& options) {
  OrderedJson json;
  json["producer"] = producer(options);
  json["quantization"] = {{"quant_algo", "MIXED_PRECISION"},
                          {"moe_quant_algo", "NVFP4"},
                          {"kv_cache_quant_algo", nullptr},
                          {"group_size", kNvfp4GroupSize},
                          {"exclude_modules", excluded_modules(plan)},
                          {"quantized_layers", quantized_layers(plan)}};
  return json.dump(2) + "\n";
}

std::string make_index_json(const QuantizePlan& plan) {
  nlohmann::json map = nlohmann::json::object();  // sorted: an ordered_json of 100 000 keys would be searched linearly
  for (const OutputShard& shard : plan.shards)
    for (const OutputTensor& tensor : shard.tensors) map[tensor.spec.name] = shard.file_name;
  nlohmann::json json;
  json["metadata"] = {{"total_size", plan.target_bytes}};
  json["weight_map"] = std::move(map);
  return json.dump(1) + "\n";
}

}  // namespace dsv4
