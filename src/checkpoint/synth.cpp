// The folder of a synthetic checkpoint: which tensor goes into which shard, and the JSON files around them.
#include "checkpoint/synth.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <filesystem>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/inventory.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/synth_encode.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

// ---- configurations ----

// What all released configurations have in common (spec 1.1).
Json common_config() {
  return Json::parse(R"({
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16",
    "bos_token_id": 0, "eos_token_id": 1, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
    "n_shared_experts": 1, "norm_topk_prob": true, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
    "max_position_embeddings": 1048576, "sliding_window": 128, "index_head_dim": 128, "hc_mult": 4, "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06, "swiglu_limit": 10.0, "hidden_act": "silu", "rms_norm_eps": 1e-06, "num_nextn_predict_layers": 0,
    "attention_bias": false, "tie_word_embeddings": false
  })");
}

Json demo_config() {
  Json config = common_config();
  config.update(Json::parse(R"({
    "vocab_size": 4096, "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "q_lora_rank": 128, "o_lora_rank": 128, "o_groups": 2, "n_routed_experts": 24, "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.5, "num_hash_layers": 2, "compress_ratios": [0, 0, 4, 128, 4, 128], "index_n_heads": 8,
    "index_topk": 64
  })"));
  return config;
}

Json flash_config() {
  Json config = common_config();
  config.update(Json::parse(R"({
    "vocab_size": 129280, "hidden_size": 4096, "moe_intermediate_size": 2048, "num_hidden_layers": 43,
    "num_attention_heads": 64, "q_lora_rank": 1024, "o_lora_rank": 1024, "o_groups": 8, "n_routed_experts": 256,
    "num_experts_per_tok": 6, "routed_scaling_factor": 1.5, "num_hash_layers": 3, "index_n_heads": 64, "index_topk": 512
  })"));
  std::vector<int> ratios{0, 0};
  while (ratios.size() < 43) ratios.push_back(ratios.size() % 2 == 0 ? 4 : 128);
  config["compress_ratios"] = ratios;
  return config;
}

Json pro_config() {
  Json config = common_config();
  config.update(Json::parse(R"({
    "vocab_size": 129280, "hidden_size": 7168, "moe_intermediate_size": 3072, "num_hidden_layers": 61,
    "num_attention_heads": 128, "q_lora_rank": 1536, "o_lora_rank": 1024, "o_groups": 16, "n_routed_experts": 384,
    "num_experts_per_tok": 6, "routed_scaling_factor": 2.5, "num_hash_layers": 3, "index_n_heads": 64, "index_topk": 1024
  })"));
  std::vector<int> ratios{128, 128};
  while (ratios.size() < 61) ratios.push_back(ratios.size() % 2 == 0 ? 4 : 128);
  config["compress_ratios"] = ratios;
  return config;
}

// As each exporter writes it (spec 7.1, 7.4, 7.5). null: no quantisation.
Json quantization_config(SynthVariant variant, int num_layers) {
  const Json fp8 =
      Json::parse(R"({"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
                                   "weight_block_size": [128, 128]})");
  if (variant == SynthVariant::kBf16) return nullptr;
  if (variant == SynthVariant::kOfficial) return fp8;
  if (variant == SynthVariant::kCompressed)
    return Json::parse(R"({
      "quant_method": "compressed-tensors", "format": "mixed-precision",
      "config_groups": {
        "group_0": {"format": "float-quantized", "targets": ["re:.*attn.*", "re:.*shared_experts.*"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}},
        "group_1": {"format": "nvfp4-pack-quantized", "targets": ["re:.*ffn\\.experts.*"],
                    "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
                    "input_activations": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                                          "dynamic": "local"}}},
      "ignore": ["head", "re:.*ffn\\.gate.*", "re:.*compressor.*", "re:.*weights_proj.*"]})");
  Json config = fp8;
  config.update(Json::parse(R"({
    "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "kv_cache_quant_algo": null, "group_size": 16,
    "config_groups": {"group_0": {
      "weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": false},
      "input_activations": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": false}, "targets": ["Linear"]}},
    "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
    "producer": {"name": "dsv4", "version": "synth"}
  })"));
  Json layers = Json::object();
  for (int layer = 0; layer < num_layers; ++layer)
    layers[fmt::format("layers.{}.ffn.experts", layer)] = {{"quant_algo", "NVFP4"}, {"group_size", 16}};
  config["quantized_layers"] = std::move(layers);
  return config;
}

Json final_config(const SynthOptions& options) {
  Json config = options.config;
  config.erase("quantization_config");
  config.erase("expert_dtype");
  config["num_nextn_predict_layers"] = 0;  // no draft layers are written
  const Json quantization = quantization_config(options.variant, config.value("num_hidden_layers", 0));
  if (!quantization.is_null()) config["quantization_config"] = quantization;
  if (options.variant == SynthVariant::kOfficial || options.variant == SynthVariant::kModelOpt)
    config["expert_dtype"] = "fp4";
  return config;
}

// ---- tokenizer ----

std::string utf8_of(int code_point) {  // below U+0800
  if (code_point < 0x80) return std::string(1, static_cast<char>(code_point));
  return {static_cast<char>(0xc0 | (code_point >> 6)), static_cast<char>(0x80 | (code_point & 0x3f))};
}

// The byte-level alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and on.
std::vector<std::string> byte_characters() {
  std::vector<std::string> characters;
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    characters.push_back(utf8_of(printable ? byte : next++));
  }
  return characters;
}

// ---- weight files ----

using Shard = std::vector<SynthPart>;

// The parts of one tensor stay together; a shard is closed when the next tensor would pass shard_bytes.
std::vector<Shard> plan_shards(const std::vector<LogicalTensor>& tensors, const SynthOptions& options) {
  std::vector<Shard> shards(1);
  int64_t shard_bytes = 0;
  for (const LogicalTensor& tensor : tensors) {
    std::vector<SynthPart> parts = list_synth_parts(tensor, options.variant);
    int64_t bytes = 0;
    for (const SynthPart& part : parts) bytes += part.bytes();
    if (shard_bytes > 0 && shard_bytes + bytes > options.shard_bytes) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    shard_bytes += bytes;
    for (SynthPart& part : parts) shards.back().push_back(std::move(part));
  }
  // By falling element size, so that tensors start aligned; but the scalar scales of a matrix after its codes, so that it is generated
  // once, and before tensors whose size is no multiple of 4.
  const auto rank = [](const SynthPart& part) -> int64_t {
    const bool scalar_scale = part.kind == SynthPartKind::kGlobalScale || part.kind == SynthPartKind::kGlobalScaleRcp ||
                              part.kind == SynthPartKind::kInputScale || part.kind == SynthPartKind::kInputScaleRcp;
    if (scalar_scale) return 4;
    const int64_t size = dtype_bytes(part.spec.dtype);
    if (size >= 4) return size + 4;
    return (part.bytes() % 4 == 0 ? 5 : 0) + size - 1;
  };
  for (Shard& shard : shards)
    std::stable_sort(shard.begin(), shard.end(),
                     [&](const SynthPart& a, const SynthPart& b) { return rank(a) > rank(b); });
  return shards;
}

std::string shard_name(size_t shard, size_t num_shards) {
  if (num_shards == 1) return "model.safetensors";
  return fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, num_shards);
}

// Appends to a weight file on a thread of its own, so that the next piece is made while this one waits for the disk.
class BackgroundAppender {
 public:
  explicit BackgroundAppender(SafetensorsWriter& writer) : writer_(writer), thread_([this] { run(); }) {}
  ~BackgroundAppender() { stop(); }

  void push(std::vector<std::byte> piece) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return pieces_.size() < kMaxPieces || error_; });
    rethrow();
    pieces_.push_back(std::move(piece));
    changed_.notify_all();
  }
  // Everything is in the writer, or the error of the first append that failed is thrown.
  void finish() {
    stop();
    rethrow();
  }

 private:
  static constexpr size_t kMaxPieces = 3;

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return !pieces_.empty() || stopping_; });
      if (pieces_.empty() || error_) return;
      const std::vector<std::byte> piece = std::move(pieces_.front());
      lock.unlock();
      std::exception_ptr error;
      try {
        writer_.append(piece.data(), piece.size());
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      error_ = error;
      pieces_.pop_front();
      changed_.notify_all();
    }
  }
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }
  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

  SafetensorsWriter& writer_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::vector<std::byte>> pieces_;
  std::exception_ptr error_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

void make_empty_folder(const fs::path& folder) {
  std::error_code error;
  if (fs::exists(folder, error)) {
    if (!fs::is_directory(folder, error) || !fs::is_empty(folder, error))
      throw_bad_input("{}: exists and is not an empty folder", folder.string());
    return;
  }
  if (!fs::create_directories(folder, error)) throw_resource("{}: cannot create: {}", folder.string(), error.message());
}

}  // namespace

SynthVariant synth_variant_from_name(std::string_view name) {
  if (name == "bf16") return SynthVariant::kBf16;
  if (name == "official") return SynthVariant::kOfficial;
  if (name == "modelopt") return SynthVariant::kModelOpt;
  if (name == "compressed") return SynthVariant::kCompressed;
  throw_usage("unknown variant \"{}\", expected bf16, official, modelopt or compressed", name);
}

Json synth_shape_config(std::string_view shape) {
  if (shape == "demo") return demo_config();
  if (shape == "flash") return flash_config();
  if (shape == "pro") return pro_config();
  throw_usage("unknown shape \"{}\", expected demo, flash or pro", shape);
}

void resize_synth_config(Json& config, int num_layers, int num_experts) {
  const ModelConfig model = parse_model_config(config, "synth configuration");
  if (num_layers > 0) {
    std::vector<int> ratios = model.compress_ratios;
    while (ratios.size() < static_cast<size_t>(num_layers))
      ratios.push_back(ratios[ratios.size() - std::min<size_t>(2, ratios.size())]);
    ratios.resize(static_cast<size_t>(num_layers));
    config["compress_ratios"] = ratios;
    config["num_hidden_layers"] = num_layers;
    config["num_hash_layers"] = std::min(model.num_hash_layers, num_layers);
  }
  if (num_experts > 0) {
    config["n_routed_experts"] = num_experts;
    config["num_experts_per_tok"] = std::min(model.num_topk, num_experts);
  }
}

std::string synth_tokenizer_json(int64_t vocab_size, int64_t bos_token_id, int64_t eos_token_id) {
  const std::vector<std::string> specials{"<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"};
  std::vector<std::string> tokens = specials;
  for (std::string& character : byte_characters()) tokens.push_back(std::move(character));
  const int64_t needed = static_cast<int64_t>(tokens.size()) + 2;
  if (vocab_size < needed)
    throw_bad_input("vocab_size = {} is too small for a byte-level tokenizer, which needs {}", vocab_size, needed);

  Json vocab = Json::object();
  Json added = Json::array();
  const auto add_special = [&added](const std::string& content, int64_t id) {
    added.push_back({{"id", id},
                     {"content", content},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  };
  size_t next = 0;
  for (int64_t id = 0; id < vocab_size; ++id) {
    std::string content;
    if (id == bos_token_id)
      content = "<｜begin▁of▁sentence｜>";
    else if (id == eos_token_id)
      content = "<｜end▁of▁sentence｜>";
    else if (next < tokens.size())
      content = tokens[next++];
    else
      content = fmt::format("filler_{}", id);
    const bool is_special = id == bos_token_id || id == eos_token_id ||
                            std::find(specials.begin(), specials.end(), content) != specials.end();
    if (is_special) add_special(content, id);
    vocab[content] = id;
  }

  Json splits = Json::array();
  for (const char* pattern :
       {R"(\p{N}{1,3})", "[一-龥぀-ゟ゠-ヿ]+",
        R"([!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|)"
        R"( ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"})
    splits.push_back(
        {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}});
  splits.push_back({{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}});
  const Json tokenizer = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", splits}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"ignore_merges", false},
        {"vocab", vocab},
        {"merges", Json::array()}}}};
  return tokenizer.dump(1) + "\n";
}

namespace {

// Everything but the shards. Written last: without them a folder left by an interrupted run is refused.
void write_configuration(const fs::path& folder, const Json& config_json, const ModelConfig& config,
                         SynthVariant variant, const Json* index) {
  const auto write = [&folder](const char* name, const Json& json) {
    write_file_atomically((folder / name).string(), json.dump(1) + "\n");
  };
  if (index) write("model.safetensors.index.json", *index);
  if (variant == SynthVariant::kModelOpt) {
    Json quantization = config_json["quantization_config"];
    quantization["exclude_modules"] = quantization["ignore"];
    quantization.erase("ignore");
    const Json producer = quantization["producer"];
    quantization.erase("producer");
    write("hf_quant_config.json", {{"producer", producer}, {"quantization", quantization}});
  }
  write("tokenizer_config.json", {{"tokenizer_class", "PreTrainedTokenizerFast"},
                                  {"bos_token", "<｜begin▁of▁sentence｜>"},
                                  {"eos_token", "<｜end▁of▁sentence｜>"}});
  write("generation_config.json", {{"bos_token_id", config.bos_token_id},
                                   {"eos_token_id", config.eos_token_ids},
                                   {"do_sample", true},
                                   {"temperature", 1.0},
                                   {"top_p", 1.0}});
  write("config.json", config_json);
}

}  // namespace

SynthResult write_synth_checkpoint(const std::string& dst, const SynthOptions& options) {
  if (options.shard_bytes <= 0) throw_usage("shard size of {} bytes, expected more than 0", options.shard_bytes);
  const Json config_json = final_config(options);
  const ModelConfig config = parse_model_config(config_json, "synth configuration");
  const std::string tokenizer = synth_tokenizer_json(config.vocab_size, config.bos_token_id, config.eos_token_ids[0]);
  const std::vector<LogicalTensor> tensors = list_tensors(config);
  const std::vector<Shard> shards = plan_shards(tensors, options);

  SynthResult result;
  result.num_files = static_cast<int>(shards.size());
  for (const Shard& shard : shards)
    for (const SynthPart& part : shard) {
      result.bytes += part.bytes();
      ++result.num_tensors;
    }

  const fs::path folder(dst);
  make_empty_folder(folder);
  SynthEncoder encoder(config, options);
  Json weight_map = Json::object();
  int64_t bytes_done = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    std::vector<TensorSpec> specs;
    for (const SynthPart& part : shards[i]) {
      specs.push_back(part.spec);
      weight_map[part.spec.name] = shard_name(i, shards.size());
    }
    SafetensorsWriter writer((folder / shard_name(i, shards.size())).string(), specs, {{"format", "pt"}});
    BackgroundAppender appender(writer);
    for (const SynthPart& part : shards[i])
      encoder.encode(part, [&](std::vector<std::byte> piece) {
        bytes_done += static_cast<int64_t>(piece.size());
        appender.push(std::move(piece));
        if (options.progress) options.progress(bytes_done, result.bytes);
      });
    appender.finish();
    writer.finish();
  }

  write_file_atomically((folder / "tokenizer.json").string(), tokenizer);
  const Json index{{"metadata", {{"total_size", result.bytes}}}, {"weight_map", weight_map}};
  write_configuration(folder, config_json, config, options.variant, shards.size() > 1 ? &index : nullptr);
  return result;
}

}  // namespace dsv4
