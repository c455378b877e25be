// Random checkpoints of any configuration, for tests and benchmarks: numerically sane, and the same model in each variant.
//
// Every tensor's values depend only on (seed, tensor name, element), are rounded to bf16, and are then encoded as the
// variant stores them; so the variants of one seed differ by quantisation alone, and thread count changes nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "base/json.h"

namespace dsv4 {

enum class SynthVariant : uint8_t {
  kBf16,        // everything BF16
  kOfficial,    // FP8 128x128 blocks with ue8m0 scales, routed experts MXFP4
  kModelOpt,    // as official, routed experts NVFP4 (weight_scale, weight_scale_2, input_scale)
  kCompressed,  // compressed-tensors: FP8 blocks with bf16 scales, routed experts nvfp4-pack-quantized
};
// "bf16", "official", "modelopt", "compressed"; throws a usage error on anything else.
SynthVariant synth_variant_from_name(std::string_view name);

struct SynthOptions {
  Json config;  // config.json; a quantization_config in it is replaced
  SynthVariant variant = SynthVariant::kBf16;
  uint64_t seed = 1;
  int64_t shard_bytes = 4ll << 30;  // more data than this: shards of about this size and an index
  int num_threads = 0;              // 0 = all CPUs
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;  // may be empty
};

struct SynthResult {
  int64_t num_tensors = 0;
  int64_t bytes = 0;
  int num_files = 0;  // safetensors files
};

// The configuration of the demo model, DeepSeek-V4 Flash or Pro (spec 1.1), without draft layers: "demo", "flash", "pro".
Json synth_shape_config(std::string_view shape);

// Fewer layers or experts in a configuration; 0 keeps it. Layers beyond the ratio list repeat its last two entries.
void resize_synth_config(Json& config, int num_layers, int num_experts);

// dst must not exist or be an empty folder. Writes weights, config.json, generation_config.json, tokenizer.json (256 byte
// tokens, the special tokens, fillers up to vocab_size) and tokenizer_config.json.
SynthResult write_synth_checkpoint(const std::string& dst, const SynthOptions& options);

// tokenizer.json with vocab_size tokens and no merges; needs at least 263.
std::string synth_tokenizer_json(int64_t vocab_size, int64_t bos_token_id, int64_t eos_token_id);

}  // namespace dsv4
