// What quantize writes for each stored format: bytes, names, dtypes, configuration files, and what it refuses.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "checkpoint/checkpoint.h"
#include "checkpoint/checkpoint_test_util.h"
#include "checkpoint/quantize/group_rules.h"
#include "checkpoint/quantize/quantize.h"
#include "checkpoint/quantize/source_rows.h"
#include "codec/fp8_block.h"
#include "codec/mxfp4.h"

namespace dsv4 {
namespace {

QuantizeReport quantize(const std::string& source, const std::string& target, DenseFormat dense = DenseFormat::kKeep,
                        ScaleRule scale = ScaleRule::kModelOpt) {
  QuantizeOptions options;
  options.source = source;
  options.target = target;
  options.dense = dense;
  options.scale = scale;
  options.num_threads = 2;
  return quantize_checkpoint(options);
}

std::vector<float> decode_all(const StoredMatrix& m) {
  std::vector<float> out(static_cast<size_t>(m.rows * m.cols));
  const int64_t groups = m.cols / 16;
  for (int64_t r = 0; r < m.rows; ++r) {
    float* row = out.data() + r * m.cols;
    if (m.format != StoredFormat::kNvfp4ModelOpt && m.format != StoredFormat::kNvfp4Compressed) {
      decode_row(m, r, row);
      continue;
    }
    for (int64_t g = 0; g < groups; ++g)
      decode_nvfp4_group(m.weight.as<uint8_t>() + r * m.cols / 2 + 8 * g, m.scale.as<uint8_t>()[r * groups + g],
                         {m.global_scale}, row + 16 * g);
  }
  return out;
}

std::string bytes_of(const TensorView& view) {
  return std::string(reinterpret_cast<const char*>(view.data), static_cast<size_t>(view.bytes()));
}

// Source weights -> bytes, by the codec's plain functions.
void expect_weight_rule(const StoredMatrix& found, const std::vector<float>& w, GlobalScale global) {
  ASSERT_EQ(found.format, StoredFormat::kNvfp4ModelOpt) << found.name;
  ASSERT_EQ(found.global_scale, global.value) << found.name;
  ASSERT_EQ(found.input_scale.value_or(-1.0f), 1.0f);
  for (size_t g = 0; g < w.size() / 16; ++g) {
    const Nvfp4Group expected = encode_nvfp4_weight_group(w.data() + 16 * g, global);
    ASSERT_EQ(found.scale.as<uint8_t>()[g], expected.sf) << found.name << " group " << g;
    ASSERT_EQ(std::memcmp(found.weight.as<uint8_t>() + 8 * g, expected.codes, 8), 0) << found.name << " group " << g;
  }
}

float amax_of(const std::vector<float>& w) { return group_amax(w.data(), static_cast<int>(w.size())); }

constexpr const char* kDenseNames[] = {"layers.1.attn.wq_a",
                                       "layers.1.attn.wq_b",
                                       "layers.1.attn.wkv",
                                       "layers.2.attn.wo_a",
                                       "layers.2.attn.wo_b",
                                       "layers.1.attn.indexer.wq_b",
                                       "layers.0.ffn.shared_experts.w1",
                                       "layers.3.ffn.shared_experts.w2"};

class Formats : public ::testing::Test {
 protected:
  TempFolder folder_;
  std::string source_ = folder_ / "source";
  std::string target_ = folder_ / "target";
};

TEST_F(Formats, Bf16ExpertsFollowTheWeightRuleAndW1SharesItsGlobalWithW3) {
  write_tiny(source_, SynthVariant::kBf16);
  quantize(source_, target_);
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  for (int layer = 0; layer < 4; ++layer)
    for (int expert = 0; expert < 5; ++expert) {
      const std::string prefix = fmt::format("layers.{}.ffn.experts.{}.", layer, expert);
      const auto w1 = decode_all(source.matrix(prefix + "w1"));
      const auto w2 = decode_all(source.matrix(prefix + "w2"));
      const auto w3 = decode_all(source.matrix(prefix + "w3"));
      const GlobalScale both = nvfp4_global_scale(std::max(amax_of(w1), amax_of(w3)));
      expect_weight_rule(target.matrix(prefix + "w1"), w1, both);
      expect_weight_rule(target.matrix(prefix + "w3"), w3, both);
      expect_weight_rule(target.matrix(prefix + "w2"), w2, nvfp4_global_scale(amax_of(w2)));
      EXPECT_TRUE(target.at(prefix + "w1.weight_scale_2").shape.empty());
    }
  // Everything else byte for byte.
  for (const auto& file : source.files())
    for (const auto& [name, view] : file->tensors()) {
      if (name.find(".experts.") != std::string::npos) continue;
      EXPECT_EQ(target.at(name).dtype, view.dtype) << name;
      EXPECT_EQ(bytes_of(target.at(name)), bytes_of(view)) << name;
    }
}

TEST_F(Formats, DenseNvfp4GivesEveryMatrixItsOwnGlobal) {
  write_tiny(source_, SynthVariant::kBf16);
  quantize(source_, target_, DenseFormat::kNvfp4);
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  for (const char* name : kDenseNames) {
    const auto w = decode_all(source.matrix(name));
    expect_weight_rule(target.matrix(name), w, nvfp4_global_scale(amax_of(w)));
  }
  EXPECT_EQ(target.matrix("layers.1.attn.compressor.wkv").format, StoredFormat::kBf16);
  EXPECT_EQ(target.matrix("head").format, StoredFormat::kBf16);
}

TEST_F(Formats, DenseFp8WritesOfficialBlocks) {
  write_tiny(source_, SynthVariant::kBf16);
  quantize(source_, target_, DenseFormat::kFp8);
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  for (const char* name : kDenseNames) {
    const StoredMatrix found = target.matrix(name);
    ASSERT_EQ(found.format, StoredFormat::kFp8Block) << name;
    ASSERT_EQ(found.scale.dtype, DType::kF8E8M0);
    ASSERT_NE(target.find(std::string(name) + ".scale"), nullptr);
    const auto w = decode_all(source.matrix(name));
    const int64_t block_cols = (found.cols + 127) / 128;
    for (int64_t r = 0; r < found.rows; ++r)
      for (int64_t k = 0; k < found.cols; ++k) {
        float amax = 0;  // of the block (r, k) lies in
        if (r % 128 == 0 && k % 128 == 0) {
          for (int64_t i = r; i < std::min(found.rows, r + 128); ++i)
            for (int64_t j = k; j < std::min(found.cols, k + 128); ++j)
              amax = std::max(amax, std::fabs(w[static_cast<size_t>(i * found.cols + j)]));
          ASSERT_EQ(found.scale.as<uint8_t>()[r / 128 * block_cols + k / 128], fp8_block_scale(amax)) << name;
        }
        const uint8_t scale = found.scale.as<uint8_t>()[r / 128 * block_cols + k / 128];
        ASSERT_EQ(found.weight.as<uint8_t>()[r * found.cols + k],
                  encode_fp8_block_element(w[static_cast<size_t>(r * found.cols + k)], scale));
      }
  }
}

TEST_F(Formats, Mxfp4IsCastWithoutLossIncludingSignedZeros) {
  write_tiny(source_, SynthVariant::kOfficial);
  {
    EditableFile file(source_ + "/model.safetensors");
    std::string& codes = file.tensors.at("layers.1.ffn.experts.2.w1.weight").bytes;
    codes[0] = static_cast<char>(0x88);  // -0, -0
    auto& w2 = file.tensors.at("layers.1.ffn.experts.2.w2.weight").bytes;
    auto& scale = file.tensors.at("layers.1.ffn.experts.2.w2.scale").bytes;
    for (int j = 0; j < 16; ++j) w2[static_cast<size_t>(j)] = 0;  // a group of zeros whose exponent is out of range
    scale[0] = static_cast<char>(254);
    file.save();
  }
  const QuantizeReport report = quantize(source_, target_);
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  int num_matrices = 0;
  for (int layer = 0; layer < 4; ++layer)
    for (int expert = 0; expert < 5; ++expert)
      for (const char* w : {"w1", "w2", "w3"}) {
        const std::string name = fmt::format("layers.{}.ffn.experts.{}.{}", layer, expert, w);
        const StoredMatrix from = source.matrix(name);
        const StoredMatrix to = target.matrix(name);
        ASSERT_EQ(from.format, StoredFormat::kMxfp4);
        ASSERT_EQ(to.format, StoredFormat::kNvfp4ModelOpt);
        EXPECT_EQ(bytes_of(from.weight), bytes_of(to.weight)) << name;
        EXPECT_EQ(decode_all(from), decode_all(to)) << name;
        ++num_matrices;
      }
  EXPECT_EQ(target.matrix("layers.0.ffn.experts.0.w1").global_scale,
            target.matrix("layers.0.ffn.experts.0.w3").global_scale);
  EXPECT_TRUE(report.notes.empty());
  int64_t num_lossless = 0;
  for (const QuantizeKindStats& row : report.kinds) {
    if (row.to != "NVFP4 (lossless)") continue;
    num_lossless += row.num_matrices;
    EXPECT_EQ(row.error_sq, 0);
  }
  EXPECT_EQ(num_lossless, num_matrices);
  // Dense FP8 is kept as it was.
  EXPECT_EQ(bytes_of(source.at("layers.0.attn.wq_a.scale")), bytes_of(target.at("layers.0.attn.wq_a.scale")));
}

TEST_F(Formats, Mxfp4BeyondTheWindowIsNamedAndRequantised) {
  write_tiny(source_, SynthVariant::kOfficial);
  {
    EditableFile file(source_ + "/model.safetensors");
    auto& weight = file.tensors.at("layers.2.ffn.experts.1.w3.weight").bytes;
    for (int j = 0; j < 16; ++j) weight[static_cast<size_t>(j)] = 0x11;
    auto& scale = file.tensors.at("layers.2.ffn.experts.1.w3.scale").bytes;
    uint8_t largest = 0;
    for (char byte : scale) largest = std::max(largest, static_cast<uint8_t>(byte));
    scale[0] = static_cast<char>(largest - 40);
    file.save();
  }
  const QuantizeReport report = quantize(source_, target_);
  ASSERT_EQ(report.notes.size(), 2u);  // w1 shares the global scale, so both lose the cast
  EXPECT_NE(report.notes[0].find("layers.2.ffn.experts.1.w1"), std::string::npos) << report.notes[0];
  EXPECT_NE(report.notes[1].find("layers.2.ffn.experts.1.w3"), std::string::npos) << report.notes[1];
  EXPECT_NE(report.notes[1].find("1 groups of 32"), std::string::npos) << report.notes[1];
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  const auto w1 = decode_all(source.matrix("layers.2.ffn.experts.1.w1"));
  const auto w3 = decode_all(source.matrix("layers.2.ffn.experts.1.w3"));
  const GlobalScale both = nvfp4_global_scale(std::max(amax_of(w1), amax_of(w3)));
  expect_weight_rule(target.matrix("layers.2.ffn.experts.1.w1"), w1, both);
  expect_weight_rule(target.matrix("layers.2.ffn.experts.1.w3"), w3, both);
}

TEST_F(Formats, Fp8DenseBecomesNvfp4ByTheWeightRuleOnDecodedValues) {
  write_tiny(source_, SynthVariant::kOfficial);
  quantize(source_, target_, DenseFormat::kNvfp4);
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  for (const char* name : kDenseNames) {
    ASSERT_EQ(source.matrix(name).format, StoredFormat::kFp8Block);
    const auto w = decode_all(source.matrix(name));
    expect_weight_rule(target.matrix(name), w, nvfp4_global_scale(amax_of(w)));
    EXPECT_EQ(target.find(std::string(name) + ".scale"), nullptr);
  }
}

TEST_F(Formats, CompressedTensorsAreRenamedAndDecodeToTheSameNumbers) {
  write_tiny(source_, SynthVariant::kCompressed);
  quantize(source_, target_);
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  for (const char* w : {"w1", "w2", "w3"}) {
    const std::string name = std::string("layers.3.ffn.experts.4.") + w;
    const StoredMatrix from = source.matrix(name);
    const StoredMatrix to = target.matrix(name);
    ASSERT_EQ(from.format, StoredFormat::kNvfp4Compressed);
    ASSERT_EQ(to.format, StoredFormat::kNvfp4ModelOpt);
    EXPECT_EQ(bytes_of(from.weight), bytes_of(to.weight));
    EXPECT_EQ(bytes_of(from.scale), bytes_of(to.scale));
    EXPECT_EQ(to.global_scale, 1.0f / *source.at(name + ".weight_global_scale").as<float>());
    EXPECT_EQ(to.input_scale.value(), 1.0f / *source.at(name + ".input_global_scale").as<float>());
    EXPECT_EQ(target.find(name + ".weight_packed"), nullptr);
  }
  // bf16 block scales are widened to F32 under the official name: the same numbers.
  for (const char* name : kDenseNames) {
    EXPECT_EQ(decode_all(source.matrix(name)), decode_all(target.matrix(name))) << name;
    EXPECT_EQ(target.at(std::string(name) + ".scale").dtype, DType::kF32);
  }
}

TEST_F(Formats, UnequalGlobalsOfACompressedPairAreKeptAndNamed) {
  write_tiny(source_, SynthVariant::kCompressed);
  {
    EditableFile file(source_ + "/model.safetensors");
    for (const char* name : {"layers.1.ffn.experts.0.w1", "layers.1.ffn.experts.0.w3"}) {
      const float value = name[std::strlen(name) - 1] == '1' ? 100.0f : 128.0f;
      std::memcpy(file.tensors.at(std::string(name) + ".weight_global_scale").bytes.data(), &value, 4);
    }
    file.save();
  }
  const QuantizeReport report = quantize(source_, target_);
  ASSERT_FALSE(report.notes.empty());
  bool named = false;
  for (const std::string& note : report.notes) named |= note.find("layers.1.ffn.experts.0.w1") != std::string::npos;
  EXPECT_TRUE(named);
  const Checkpoint target = open_checkpoint(target_);
  EXPECT_EQ(target.matrix("layers.1.ffn.experts.0.w3").global_scale, 1.0f / 128.0f);
}

TEST_F(Formats, Nvfp4StaysNvfp4) {
  write_tiny(source_, SynthVariant::kModelOpt);
  expect_bad_input({source_, "nothing to convert"}, [&] { quantize(source_, target_); });
  quantize(source_, target_, DenseFormat::kNvfp4);
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  for (const char* suffix : {".weight", ".weight_scale", ".weight_scale_2", ".input_scale"}) {
    const std::string name = std::string("layers.1.ffn.experts.3.w2") + suffix;
    EXPECT_EQ(bytes_of(source.at(name)), bytes_of(target.at(name))) << name;
  }
  expect_bad_input({"model.safetensors: ", "layers.0.attn.wq_a", "second time"},
                   [&] { quantize(target_, folder_ / "again", DenseFormat::kFp8); });
}

TEST_F(Formats, DraftLayersPassUnchanged) {
  write_tiny(source_, SynthVariant::kOfficial);
  {
    EditableFile file(source_ + "/model.safetensors");
    file.tensors["mtp.0.ffn.experts.0.w1.weight"] = {DType::kI8, {32, 16}, std::string(512, '\x21')};
    file.tensors["mtp.0.ffn.experts.0.w1.scale"] = {DType::kF8E8M0, {32, 1}, std::string(32, '\x7f')};
    file.tensors["mtp.0.attn.wq_a.weight"] = {DType::kF8E4M3, {3, 5}, std::string(15, '\x38')};
    file.save();
  }
  quantize(source_, target_, DenseFormat::kNvfp4);
  const Checkpoint source = open_checkpoint(source_);
  const Checkpoint target = open_checkpoint(target_);
  for (const char* name : {"mtp.0.ffn.experts.0.w1.weight", "mtp.0.ffn.experts.0.w1.scale", "mtp.0.attn.wq_a.weight"}) {
    EXPECT_EQ(target.at(name).dtype, source.at(name).dtype);
    EXPECT_EQ(target.at(name).shape, source.at(name).shape);
    EXPECT_EQ(bytes_of(target.at(name)), bytes_of(source.at(name)));
  }
}

TEST_F(Formats, ConfigurationSaysWhatIsQuantisedHow) {
  write_tiny(source_, SynthVariant::kOfficial);
  quantize(source_, target_);
  const Json source = read_json_file(source_ + "/config.json");
  Json config = read_json_file(target_ + "/config.json");
  const Json q = config.at("quantization_config");
  EXPECT_EQ(q.at("quant_method"), "fp8");
  EXPECT_EQ(q.at("weight_block_size"), Json::parse("[128,128]"));
  EXPECT_EQ(q.at("scale_fmt"), "ue8m0");
  EXPECT_EQ(q.at("quant_algo"), "MIXED_PRECISION");
  EXPECT_EQ(q.at("moe_quant_algo"), "NVFP4");
  EXPECT_TRUE(q.at("kv_cache_quant_algo").is_null());
  EXPECT_EQ(q.at("group_size"), 16);
  const Json fp4 = Json::parse(R"({"num_bits": 4, "type": "float", "group_size": 16, "dynamic": false})");
  EXPECT_EQ(q.at("config_groups").at("group_0").at("weights"), fp4);
  EXPECT_EQ(q.at("config_groups").at("group_0").at("input_activations"), fp4);
  EXPECT_EQ(q.at("config_groups").at("group_0").at("targets"), Json::parse(R"(["Linear"])"));
  EXPECT_EQ(q.at("quantized_layers").size(), 4u);
  EXPECT_EQ(q.at("quantized_layers").at("layers.3.ffn.experts"),
            Json::parse(R"({"quant_algo": "NVFP4", "group_size": 16})"));
  for (const char* pattern : {"*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"})
    EXPECT_NE(std::find(q.at("ignore").begin(), q.at("ignore").end(), pattern), q.at("ignore").end()) << pattern;
  EXPECT_EQ(q.at("producer").at("name"), "modelopt");
  const Json hf = read_json_file(target_ + "/hf_quant_config.json");
  EXPECT_EQ(hf.at("producer"), q.at("producer"));
  EXPECT_EQ(hf.at("quantization").at("exclude_modules"), q.at("ignore"));
  EXPECT_EQ(hf.at("quantization").at("quantized_layers"), q.at("quantized_layers"));
  // Nothing else changes.
  EXPECT_EQ(config.at("expert_dtype"), "fp4");
  Json rest = source;
  for (Json* json : {&config, &rest}) {
    json->erase("quantization_config");
    json->erase("expert_dtype");
  }
  EXPECT_EQ(config, rest);
}

TEST_F(Formats, ConfigurationOfAPureNvfp4FolderIsModelOpts) {
  write_tiny(source_, SynthVariant::kBf16);
  quantize(source_, target_, DenseFormat::kNvfp4);
  const Json q = read_json_file(target_ + "/config.json").at("quantization_config");
  EXPECT_EQ(q.at("quant_method"), "modelopt");
  EXPECT_FALSE(q.contains("weight_block_size"));
  for (const char* name : kDenseNames) EXPECT_TRUE(q.at("quantized_layers").contains(name)) << name;
  for (const Json& pattern : q.at("ignore")) EXPECT_NE(pattern, "*.attn.*");
}

TEST_F(Formats, NanAndInfinityAreRefusedByName) {
  const struct {
    const char* tensor;
    uint16_t bits;
  } cases[] = {{"layers.1.ffn.experts.3.w2", 0x7fc0}, {"layers.1.ffn.experts.3.w3", 0xff80}};
  for (const auto& [tensor, bits] : cases) {
    TempFolder folder;
    write_tiny(folder / "source", SynthVariant::kBf16);
    {
      EditableFile file((folder / "source") + "/model.safetensors");
      std::memcpy(file.tensors.at(std::string(tensor) + ".weight").bytes.data() + 34, &bits, 2);
      file.save();
    }
    expect_bad_input({"model.safetensors: ", tensor, "row 0", "NaN or an infinity"},
                     [&] { quantize(folder / "source", folder / "target"); });
    EXPECT_FALSE(std::filesystem::exists(folder / "target"));
  }
}

TEST_F(Formats, NanScalesAreRefused) {
  write_tiny(source_, SynthVariant::kOfficial);
  {
    EditableFile file(source_ + "/model.safetensors");
    file.tensors.at("layers.1.ffn.experts.3.w2.scale").bytes[3] = '\xff';
    file.save();
  }
  expect_bad_input({"layers.1.ffn.experts.3.w2"}, [&] { quantize(source_, target_); });
}

TEST_F(Formats, AllZeroExpertsQuantiseToZeros) {
  for (const SynthVariant variant : {SynthVariant::kBf16, SynthVariant::kOfficial}) {
    TempFolder folder;
    write_tiny(folder / "source", variant);
    {
      EditableFile file((folder / "source") + "/model.safetensors");
      for (const char* w : {"w1", "w3"}) {
        auto& bytes = file.tensors.at(std::string("layers.0.ffn.experts.0.") + w + ".weight").bytes;
        bytes.assign(bytes.size(), '\0');
      }
      file.save();
    }
    quantize(folder / "source", folder / "target");
    const Checkpoint target = open_checkpoint(folder / "target");
    EXPECT_EQ(target.matrix("layers.0.ffn.experts.0.w1").global_scale, 1.0f);
    for (float x : decode_all(target.matrix("layers.0.ffn.experts.0.w3"))) ASSERT_EQ(x, 0.0f);
  }
}

}  // namespace
}  // namespace dsv4
