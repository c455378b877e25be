// Synthetic checkpoints: deterministic, and the same model in each storage variant.
#include "checkpoint/synth.h"

#include <cmath>

#include "checkpoint/checkpoint.h"
#include "checkpoint/inventory.h"
#include "checkpoint/stored_matrix.h"
#include "checkpoint/synth_loops.h"
#include "checkpoint_test_util.h"
#include "codec/e4m3.h"
#include "codec/fp8_block.h"
#include "codec/mxfp4.h"
#include "codec/nvfp4.h"

namespace dsv4 {
namespace {

constexpr SynthVariant kVariants[] = {SynthVariant::kBf16, SynthVariant::kOfficial, SynthVariant::kModelOpt,
                                      SynthVariant::kCompressed};

// Element by element, straight from the formulas of spec 7; no code shared with the encoder.
float decode(const StoredMatrix& m, int64_t row, int64_t col) {
  const int64_t index = row * m.cols + col;
  const auto nibble = [&] {
    return static_cast<uint8_t>((m.weight.as<uint8_t>()[index / 2] >> (index % 2 * 4)) & 0xf);
  };
  switch (m.format) {
    case StoredFormat::kF32:
      return m.weight.as<float>()[index];
    case StoredFormat::kBf16:
      return decode_bf16(m.weight.as<bf16>()[index]);
    case StoredFormat::kFp8Block: {
      const int64_t tile = row / 128 * m.scale.shape[1] + col / 128;
      const float scale = m.scale.dtype == DType::kBf16 ? decode_bf16(m.scale.as<bf16>()[tile])
                                                        : std::ldexp(1.0f, m.scale.as<uint8_t>()[tile] - 127);
      return decode_e4m3(m.weight.as<uint8_t>()[index]) * scale;
    }
    case StoredFormat::kMxfp4:
      return decode_e2m1(nibble()) * std::ldexp(1.0f, m.scale.as<uint8_t>()[index / 32] - 127);
    case StoredFormat::kNvfp4ModelOpt:
    case StoredFormat::kNvfp4Compressed:
      return decode_e2m1(nibble()) * decode_e4m3(m.scale.as<uint8_t>()[index / 16]) * m.global_scale;
  }
  return 0;
}

TEST(Synth, AllVariantsHoldTheSameModel) {
  TempFolder folder;
  std::map<SynthVariant, Checkpoint> checkpoints;
  for (SynthVariant variant : kVariants) {
    const std::string path = folder / std::to_string(static_cast<int>(variant));
    write_tiny(path, variant);
    checkpoints.emplace(variant, open_checkpoint(path));
  }
  const Checkpoint& exact = checkpoints.at(SynthVariant::kBf16);
  for (const LogicalTensor& tensor : list_tensors(exact.config())) {
    for (const auto& [variant, checkpoint] : checkpoints) {
      SCOPED_TRACE(fmt::format("{} in variant {}", tensor.name, static_cast<int>(variant)));
      if (!tensor.is_matrix()) {
        ASSERT_EQ(
            std::memcmp(checkpoint.at(tensor.name).data, exact.at(tensor.name).data, exact.at(tensor.name).bytes()), 0);
        continue;
      }
      const StoredMatrix reference = exact.matrix(tensor.name), stored = checkpoint.matrix(tensor.name);
      double error = 0, power = 0;
      for (int64_t row = 0; row < reference.rows; ++row)
        for (int64_t col = 0; col < reference.cols; ++col) {
          const double value = decode(reference, row, col);
          error += std::pow(decode(stored, row, col) - value, 2);
          power += value * value;
        }
      // Half steps of the formats on normal data: e4m3 about 2.6 %, e2m1 about 10 % (groups of 16 or 32).
      const double limit = stored.format == StoredFormat::kBf16       ? 0.0
                           : stored.format == StoredFormat::kFp8Block ? 0.04
                                                                      : 0.15;
      ASSERT_LE(std::sqrt(error / power), limit);
      ASSERT_GT(power, 0.0);
      const double fan_in_rms = std::sqrt(power / static_cast<double>(reference.rows));
      ASSERT_GT(fan_in_rms, 0.5);
    }
  }
}

TEST(Synth, Nvfp4FollowsTheModelOptWeightRule) {
  TempFolder folder;
  write_tiny(folder / "bf16", SynthVariant::kBf16);
  write_tiny(folder / "modelopt", SynthVariant::kModelOpt);
  const Checkpoint exact = open_checkpoint(folder / "bf16"), quantised = open_checkpoint(folder / "modelopt");
  const std::string stem = "layers.3.ffn.experts.2.";
  float amax = 0;
  for (const char* name : {"w1", "w3"}) {
    const StoredMatrix m = exact.matrix(stem + name);
    for (int64_t i = 0; i < m.rows * m.cols; ++i) amax = std::max(amax, std::fabs(decode_bf16(m.weight.as<bf16>()[i])));
  }
  for (const char* name : {"w1", "w3"}) {
    const StoredMatrix source = exact.matrix(stem + name), stored = quantised.matrix(stem + name);
    ASSERT_EQ(stored.global_scale, amax / 2688.0f) << "w1 and w3 share the amax of both";
    EXPECT_EQ(*stored.input_scale, *quantised.matrix(stem + "w1").input_scale);
    for (int64_t group = 0; group < source.rows * source.cols / 16; ++group) {
      float values[16], group_max = 0;
      for (int i = 0; i < 16; ++i) {
        values[i] = decode_bf16(source.weight.as<bf16>()[group * 16 + i]);
        group_max = std::max(group_max, std::fabs(values[i]));
      }
      const uint8_t sf = encode_e4m3(std::max(group_max / (6.0f * stored.global_scale), 0x1p-9f));
      ASSERT_EQ(stored.scale.as<uint8_t>()[group], sf);
      for (int i = 0; i < 16; ++i) {
        const uint8_t byte = stored.weight.as<uint8_t>()[group * 8 + i / 2];
        ASSERT_EQ((byte >> (i % 2 * 4)) & 0xf, encode_e2m1(values[i] / (decode_e4m3(sf) * stored.global_scale)));
      }
    }
  }
  EXPECT_NE(quantised.matrix(stem + "w2").global_scale, quantised.matrix(stem + "w1").global_scale);
}

std::map<std::string, std::string> folder_bytes(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    files[entry.path().filename()] = read_bytes(entry.path());
  return files;
}

TEST(Synth, BytesDependOnTheSeedAndOnNothingElse) {
  TempFolder folder;
  SynthOptions options;
  options.config = tiny_config();
  for (SynthVariant variant : kVariants) {
    options.variant = variant;
    const auto write = [&](uint64_t seed, int threads, int64_t shard_bytes) {
      options.seed = seed;
      options.num_threads = threads;
      options.shard_bytes = shard_bytes;
      std::filesystem::remove_all(folder / "x");
      write_synth_checkpoint(folder / "x", options);
      return folder_bytes(folder / "x");
    };
    const auto first = write(1, 1, 1 << 30);
    EXPECT_EQ(first, write(1, 3, 1 << 30));
    EXPECT_NE(first.at("model.safetensors"), write(2, 1, 1 << 30).at("model.safetensors"));
    // Shards hold the same tensors.
    write(1, 2, 50000);
    const Checkpoint sharded = open_checkpoint(folder / "x");
    EXPECT_GT(sharded.files().size(), 2u);
    write_bytes(folder / "whole.safetensors", first.at("model.safetensors"));
    const SafetensorsFile whole(folder / "whole.safetensors");
    for (const auto& [name, tensor] : whole.tensors())
      ASSERT_EQ(std::memcmp(tensor.data, sharded.at(name).data, tensor.bytes()), 0) << name;
  }
}

// Readers that map tensors want them at multiples of their element size, in every shard (FP8 scales of a small matrix have one or two bytes).
TEST(Synth, TensorsStartAligned) {
  TempFolder folder;
  SynthOptions options;
  for (SynthVariant variant : kVariants)
    for (int layers : {1, 3}) {
      options.config = synth_shape_config("demo");
      resize_synth_config(options.config, layers, 0);
      options.variant = variant;
      options.shard_bytes = 1 << 20;
      std::filesystem::remove_all(folder / "x");
      write_synth_checkpoint(folder / "x", options);
      for (const auto& entry : std::filesystem::directory_iterator(folder / "x")) {
        if (entry.path().extension() != ".safetensors") continue;
        const SafetensorsFile file(entry.path().string());  // its own tensors would be realigned
        for (const auto& [name, tensor] : parse_safetensors(file.mapped_bytes(), "file").tensors)
          EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(dtype_bytes(tensor.dtype)), 0u)
              << entry.path() << " " << name;
      }
    }
}

TEST(Synth, ExpertTableHasDistinctExpertsInRange) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kBf16);
  const Checkpoint checkpoint = open_checkpoint(folder.path());
  const TensorView& table = checkpoint.at("layers.0.ffn.gate.tid2eid");
  validate_expert_table("tid2eid", table, 5);
  bool seen[5] = {};
  for (int64_t token = 0; token < 320; ++token) {
    EXPECT_NE(table.as<int64_t>()[2 * token], table.as<int64_t>()[2 * token + 1]) << token;
    for (int k = 0; k < 2; ++k) seen[table.as<int64_t>()[2 * token + k]] = true;
  }
  for (bool expert : seen) EXPECT_TRUE(expert);
}

TEST(Synth, QuantizationConfigSaysWhatIsStored) {
  TempFolder folder;
  const auto config_of = [&](SynthVariant variant) {
    std::filesystem::remove_all(folder / "x");
    write_tiny(folder / "x", variant);
    return read_json_file(folder / "x/config.json");
  };
  EXPECT_FALSE(config_of(SynthVariant::kBf16).contains("quantization_config"));
  EXPECT_EQ(config_of(SynthVariant::kOfficial)["quantization_config"]["quant_method"], "fp8");
  EXPECT_EQ(config_of(SynthVariant::kCompressed)["quantization_config"]["quant_method"], "compressed-tensors");
  const Json modelopt = config_of(SynthVariant::kModelOpt);
  EXPECT_EQ(modelopt["quantization_config"]["moe_quant_algo"], "NVFP4");
  EXPECT_EQ(modelopt["quantization_config"]["quantized_layers"].size(), 4u);
  EXPECT_EQ(read_json_file(folder / "x/hf_quant_config.json")["quantization"]["exclude_modules"].size(), 4u);
}

TEST(Synth, TokenizerCoversTheVocabulary) {
  const Json tokenizer = Json::parse(synth_tokenizer_json(300, 7, 3));
  const Json& vocab = tokenizer["model"]["vocab"];
  EXPECT_EQ(vocab.size(), 300u);
  std::vector<bool> used(300);
  for (const auto& [content, id] : vocab.items()) used[id.get<size_t>()] = true;
  EXPECT_EQ(std::count(used.begin(), used.end(), true), 300);
  EXPECT_EQ(vocab["<｜begin▁of▁sentence｜>"], 7);
  EXPECT_EQ(vocab["<｜end▁of▁sentence｜>"], 3);
  EXPECT_TRUE(vocab.contains("Ġ"));
  EXPECT_EQ(tokenizer["added_tokens"].size(), 7u);
  expect_bad_input({"vocab_size = 262", "263"}, [] { synth_tokenizer_json(262, 0, 1); });
}

TEST(Synth, ShapesCanBeCutDown) {
  Json config = synth_shape_config("flash");
  resize_synth_config(config, 5, 4);
  const ModelConfig model = parse_model_config(config, "x");
  EXPECT_EQ(model.compress_ratios, (std::vector<int>{0, 0, 4, 128, 4}));
  EXPECT_EQ(model.num_experts, 4);
  EXPECT_EQ(model.num_topk, 4);
  EXPECT_EQ(model.num_hash_layers, 3);
  config = synth_shape_config("demo");
  resize_synth_config(config, 9, 0);
  EXPECT_EQ(parse_model_config(config, "x").compress_ratios, (std::vector<int>{0, 0, 4, 128, 4, 128, 4, 128, 4}));
  config = synth_shape_config("demo");
  resize_synth_config(config, 1, 0);
  EXPECT_EQ(parse_model_config(config, "x").num_hash_layers, 1);
}

TEST(Synth, RefusesWhatItCannotWrite) {
  TempFolder folder;
  write_bytes(folder / "file", "x");
  SynthOptions options;
  options.config = tiny_config();
  expect_bad_input({folder.path(), "not an empty folder"}, [&] { write_synth_checkpoint(folder.path(), options); });
  expect_bad_input({folder / "file"}, [&] { write_synth_checkpoint(folder / "file", options); });
  options.config["moe_intermediate_size"] = 48;
  options.variant = SynthVariant::kOfficial;
  expect_bad_input({"w2", "48 columns", "32"}, [&] { write_synth_checkpoint(folder / "new", options); });
  EXPECT_FALSE(std::filesystem::exists(folder / "new"));
  options.config["hidden_size"] = 0;
  expect_bad_input({"hidden_size"}, [&] { write_synth_checkpoint(folder / "new", options); });
  expect_error(ErrorKind::kUsage, {"fp5", "modelopt"}, [] { synth_variant_from_name("fp5"); });
  expect_error(ErrorKind::kUsage, {"mini", "flash"}, [] { synth_shape_config("mini"); });
}

// The definition, one element at a time; the loops may not differ on any instruction set or length.
TEST(SynthLoops, ValuesAndCodesEqualTheirDefinitions) {
  const auto value_of = [](uint64_t counter, float mean, float deviation) {
    const uint64_t bits = synth_mix(counter);
    const int64_t sum =
        static_cast<int64_t>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48));
    return mean + deviation * (static_cast<float>(sum - 131070) * (1.0f / 37837.0f));
  };
  for (const int64_t count : {1, 7, 8, 9, 64, 4112}) {
    for (const uint64_t key : {1ull, 0x8000000000000000ull, 0xfedcba9876543210ull}) {
      std::vector<float> exact(static_cast<size_t>(count)), rounded(exact);
      synth_normals(key, 12345, count, 1.0f, 0.0173f, false, exact.data());
      synth_normals(key, 12345, count, 0.0f, 0.0173f, true, rounded.data());
      float amax = 0.0f;
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t counter = key + (12345 + static_cast<uint64_t>(i)) * kSynthGolden;
        ASSERT_EQ(exact[static_cast<size_t>(i)], value_of(counter, 1.0f, 0.0173f)) << i << " of " << count;
        ASSERT_EQ(rounded[static_cast<size_t>(i)], round_bf16(value_of(counter, 0.0f, 0.0173f)))
            << i << " of " << count;
        amax = std::max(amax, std::fabs(rounded[static_cast<size_t>(i)]));
      }
      EXPECT_EQ(synth_amax(rounded.data(), count), amax);
      if (count % kNvfp4GroupSize != 0) continue;
      rounded[3] = -0.0f, rounded[5] = 0.0f;
      std::fill(rounded.begin() + 16, rounded.begin() + 32, 0.0f);  // an all-zero group
      std::vector<uint8_t> codes(static_cast<size_t>(count / 2)), sf(static_cast<size_t>(count / 16));
      const GlobalScale global = nvfp4_global_scale(amax);
      synth_nvfp4_row(rounded.data(), count, global, codes.data(), sf.data());
      for (int64_t g = 0; g < count / 16; ++g) {
        const Nvfp4Group group = encode_nvfp4_weight_group(&rounded[static_cast<size_t>(g * 16)], global);
        ASSERT_EQ(sf[static_cast<size_t>(g)], group.sf);
        ASSERT_EQ(std::memcmp(&codes[static_cast<size_t>(g * 8)], group.codes, 8), 0) << g;
      }
    }
  }
}

TEST(Synth, ProgressReachesTheTotal) {
  TempFolder folder;
  SynthOptions options;
  options.config = tiny_config();
  int64_t last = 0;
  options.progress = [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last);
    EXPECT_LE(done, total);
    last = done;
  };
  const SynthResult result = write_synth_checkpoint(folder / "x", options);
  EXPECT_EQ(last, result.bytes);
  int64_t bytes = 0;
  const Checkpoint checkpoint = open_checkpoint(folder / "x");
  for (const auto& [name, tensor] : checkpoint.files()[0]->tensors()) bytes += tensor.bytes();
  EXPECT_EQ(bytes, result.bytes);
  EXPECT_EQ(static_cast<int64_t>(checkpoint.files()[0]->tensors().size()), result.num_tensors);
}

}  // namespace
}  // namespace dsv4
