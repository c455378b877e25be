// Opening folders: each storage variant, and each way a folder can lie.
#include "checkpoint/checkpoint.h"

#include <cmath>
#include <limits>

#include "checkpoint/inventory.h"
#include "checkpoint/stored_matrix.h"
#include "checkpoint_test_util.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

TEST(Checkpoint, EachVariantIsRecognisedPerTensor) {
  struct Case {
    SynthVariant variant;
    StoredFormat expert, dense;
  };
  for (const Case& c : {Case{SynthVariant::kBf16, StoredFormat::kBf16, StoredFormat::kBf16},
                        Case{SynthVariant::kOfficial, StoredFormat::kMxfp4, StoredFormat::kFp8Block},
                        Case{SynthVariant::kModelOpt, StoredFormat::kNvfp4ModelOpt, StoredFormat::kFp8Block},
                        Case{SynthVariant::kCompressed, StoredFormat::kNvfp4Compressed, StoredFormat::kFp8Block}}) {
    TempFolder folder;
    write_tiny(folder.path(), c.variant);
    const Checkpoint checkpoint = open_checkpoint(folder.path());
    const StoredMatrix expert = checkpoint.matrix("layers.1.ffn.experts.4.w2");
    EXPECT_EQ(expert.format, c.expert);
    EXPECT_EQ(expert.rows, 96);
    EXPECT_EQ(expert.cols, 64);
    const StoredMatrix dense = checkpoint.matrix("layers.0.attn.wq_b");
    EXPECT_EQ(dense.format, c.dense);
    EXPECT_EQ(dense.rows, 6 * 48);
    EXPECT_EQ(dense.cols, 80);
    EXPECT_EQ(checkpoint.matrix("embed").format, StoredFormat::kBf16);
    validate_scales(expert);
    validate_scales(dense);
    const bool has_input_scale = c.variant == SynthVariant::kModelOpt || c.variant == SynthVariant::kCompressed;
    EXPECT_EQ(expert.input_scale.has_value(), has_input_scale);
    EXPECT_EQ(checkpoint.folder(), folder.path());
    EXPECT_EQ(checkpoint.generation_defaults().temperature, 1.0f);
    EXPECT_EQ(checkpoint.file_of("embed.weight"), folder / "model.safetensors");
  }
}

TEST(Checkpoint, CompressedTensorsDivisorsBecomeMultipliers) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kCompressed);
  const Checkpoint checkpoint = open_checkpoint(folder.path());
  const StoredMatrix matrix = checkpoint.matrix("layers.2.ffn.experts.0.w1");
  EXPECT_EQ(matrix.global_scale, 1.0f / *checkpoint.at("layers.2.ffn.experts.0.w1.weight_global_scale").as<float>());
  EXPECT_EQ(*matrix.input_scale, 1.0f / *checkpoint.at("layers.2.ffn.experts.0.w1.input_global_scale").as<float>());
}

TEST(Checkpoint, Fp8ScalesAreFoundUnderEachNameAndType) {
  for (const char* suffix : {".weight_scale", ".weight_scale_inv", ".scale"})
    for (DType dtype : {DType::kF32, DType::kBf16, DType::kF8E8M0}) {
      EditedCheckpoint checkpoint(SynthVariant::kOfficial);
      checkpoint.edit([&](auto& tensors) {
        const Shape shape = tensors.at("layers.0.attn.wq_b.scale").shape;
        tensors.erase("layers.0.attn.wq_b.scale");
        const int64_t bytes = num_elements(shape) * dtype_bytes(dtype);
        tensors["layers.0.attn.wq_b" + std::string(suffix)] = {dtype, shape, std::string(bytes, '\x01')};
      });
      const Checkpoint opened = open_checkpoint(checkpoint.folder().path());
      const StoredMatrix matrix = opened.matrix("layers.0.attn.wq_b");
      EXPECT_EQ(matrix.format, StoredFormat::kFp8Block);
      EXPECT_EQ(matrix.scale.dtype, dtype);
      EXPECT_EQ(matrix.scale.shape, (Shape{3, 1}));
    }
}

TEST(Checkpoint, DenseMatricesMayBeNvfp4) {
  EditedCheckpoint checkpoint(SynthVariant::kModelOpt);
  checkpoint.edit([](auto& tensors) {
    tensors.erase("layers.0.attn.wkv.scale");
    tensors["layers.0.attn.wkv.weight"] = {DType::kU8, {48, 48}, std::string(48 * 48, '\0')};
    tensors["layers.0.attn.wkv.weight_scale"] = {DType::kF8E4M3, {48, 6}, std::string(48 * 6, '\x38')};
    tensors["layers.0.attn.wkv.weight_scale_2"] = {DType::kF32, {1}, float_bytes(0.25f)};
  });
  const Checkpoint opened = open_checkpoint(checkpoint.folder().path());
  const StoredMatrix matrix = opened.matrix("layers.0.attn.wkv");
  EXPECT_EQ(matrix.format, StoredFormat::kNvfp4ModelOpt);
  EXPECT_EQ(matrix.global_scale, 0.25f);
  EXPECT_FALSE(matrix.input_scale.has_value());
}

TEST(Checkpoint, ShardsAreFoundThroughTheIndex) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kModelOpt, 60000);
  const Checkpoint checkpoint = open_checkpoint(folder.path());
  EXPECT_GT(checkpoint.files().size(), 3u);
  EXPECT_EQ(checkpoint.matrix("layers.3.ffn.experts.4.w3").rows, 64);
  expect_bad_input({folder.path(), "layers.9.attn.wkv"}, [&] { checkpoint.matrix("layers.9.attn.wkv"); });
  expect_bad_input({folder.path(), "\"nothing\""}, [&] { checkpoint.at("nothing"); });
}

// ---- folders and files ----

TEST(Checkpoint, MissingPartsOfAFolderAreNamed) {
  expect_bad_input({"/nonexistent", "not a folder"}, [] { open_checkpoint("/nonexistent"); });
  TempFolder folder;
  expect_unusable(folder, {"config.json", "no weights"});
  write_tiny(folder / "sub", SynthVariant::kBf16);
  fs::remove(folder / "sub/config.json");
  expect_bad_input({"config.json: cannot open", "1 problem"}, [&] { open_checkpoint(folder / "sub"); });
}

TEST(Checkpoint, ConfigAndWeightProblemsAreReportedTogether) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kBf16);
  write_bytes(folder / "config.json", "{\"hidden_size\": 0}");
  write_bytes(folder / "generation_config.json", "{\"temperature\": -1}");
  write_bytes(folder / "model.safetensors", "short");
  expect_unusable(folder, {"hidden_size", "temperature", "model.safetensors", "5 bytes"});
}

TEST(Checkpoint, DeepOrBrokenJsonIsRefused) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kBf16);
  write_bytes(folder / "config.json", std::string(1 << 20, '['));
  expect_unusable(folder, {"config.json", "nested deeper"});
  write_bytes(folder / "config.json", "{\"a\":1,\"a\":2}");
  expect_unusable(folder, {"config.json", "duplicate"});
  fs::remove(folder / "config.json");
  fs::create_directory(folder / "config.json");
  expect_unusable(folder, {"config.json", "not a regular file"});
}

TEST(Checkpoint, TruncatedWeightsAreRefused) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kOfficial);
  fs::resize_file(folder / "model.safetensors", fs::file_size(folder / "model.safetensors") - 1);
  expect_unusable(folder, {"model.safetensors", "truncated", "inventory not checked"});
}

TEST(Checkpoint, DamagedHeadersNeverEndInAnythingButBadInput) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kModelOpt);
  const std::string path = folder / "model.safetensors", bytes = read_bytes(path);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  uint64_t state = 1;
  int refused = 0;
  for (int round = 0; round < 150; ++round) {
    std::string damaged = bytes;
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    damaged[8 + (state >> 20) % header_bytes] ^= static_cast<char>(1 << (state >> 61));
    write_bytes(path, damaged);
    try {
      open_checkpoint(folder.path());
    } catch (const Error& error) {
      ASSERT_EQ(error.kind(), ErrorKind::kBadInput) << error.what();
      ++refused;
    }
  }
  EXPECT_GT(refused, 130) << "a flip may hide only in blanks";
}

class ShardedFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    write_tiny(folder_.path(), SynthVariant::kBf16, 60000);
    index_ = read_json_file(folder_ / kIndex);
  }
  void save_index() { write_bytes(folder_ / kIndex, index_.dump()); }
  Json& weight_map() { return index_["weight_map"]; }

  static constexpr const char* kIndex = "model.safetensors.index.json";
  static constexpr const char* kTensor = "layers.1.attn.wq_a.weight";
  TempFolder folder_;
  Json index_;
};

TEST_F(ShardedFolder, IndexMustNameFilesOfTheFolder) {
  TempFolder outside;
  write_bytes(outside / "x.safetensors", safetensors_bytes("{}", ""));
  const std::string relative = "../" + fs::path(outside.path()).filename().string() + "/x.safetensors";
  for (const std::string& name : {relative, outside / "x.safetensors", std::string(".."), std::string(""),
                                  std::string("sub/x"), std::string("x\0y", 3)}) {
    SCOPED_TRACE(name);
    weight_map()[kTensor] = name;
    save_index();
    expect_unusable(folder_, {kIndex, kTensor, "name of a file in the folder"});
  }
}

TEST_F(ShardedFolder, MissingShardIsNamed) {
  const std::string shard = weight_map()[kTensor];
  fs::remove(folder_ / shard);
  expect_unusable(folder_, {folder_ / shard, "missing", "inventory not checked"});
}

TEST_F(ShardedFolder, IndexMustBeWellFormed) {
  weight_map()[kTensor] = 7;
  save_index();
  expect_unusable(folder_, {kIndex, kTensor, "not a string"});
  write_bytes(folder_ / kIndex, "{}");
  expect_unusable(folder_, {kIndex, "weight_map"});
  write_bytes(folder_ / kIndex, "{\"weight_map\":{}}");
  expect_unusable(folder_, {kIndex, "weight_map is empty"});
  write_bytes(folder_ / kIndex, "[1]");
  expect_unusable(folder_, {kIndex, "weight_map"});
  write_bytes(folder_ / kIndex, "{\"weight_map\":{\"a\":\"b\",\"a\":\"c\"}}");
  expect_unusable(folder_, {kIndex, "duplicate"});
  write_bytes(folder_ / kIndex, std::string(5000, '{'));
  expect_unusable(folder_, {kIndex, "invalid JSON"});
}

TEST_F(ShardedFolder, IndexAndShardsMustAgree) {
  const std::string shard = weight_map()[kTensor];
  weight_map().erase(kTensor);
  weight_map()["layers.77.made.up"] = shard;
  save_index();
  expect_unusable(
      folder_, {"2 problems", std::string("layers.77.made.up is listed in ") + (folder_ / shard) + " but is not there",
                std::string(kTensor) + " of " + (folder_ / shard) + " is not listed"});
  weight_map().erase("layers.77.made.up");
  weight_map()[kTensor] = weight_map()["norm.weight"];
  save_index();
  expect_unusable(folder_, {"1 problem", std::string(kTensor) + " is listed in", "but is in " + (folder_ / shard)});
}

TEST_F(ShardedFolder, TensorInTwoShardsIsRefused) {
  const std::string other = weight_map()["norm.weight"];
  EditableFile file(folder_ / other);
  ASSERT_FALSE(file.tensors.contains(kTensor));
  file.tensors[kTensor] = {DType::kBf16, {1}, "xx"};
  file.save();
  expect_unusable(folder_, {std::string("tensor ") + kTensor + " is in both", other});
}

TEST_F(ShardedFolder, SingleFileBesideAnIndexIsAmbiguous) {
  write_bytes(folder_ / "model.safetensors", safetensors_bytes("{}", ""));
  expect_unusable(folder_, {"has both model.safetensors and model.safetensors.index.json"});
}

TEST_F(ShardedFolder, SymlinksMayNotLeaveTheFolder) {
  TempFolder outside;
  const std::string shard = weight_map()[kTensor];
  fs::rename(folder_ / shard, outside / "blob");
  fs::create_symlink(outside / "blob", folder_ / shard);
  expect_unusable(folder_, {folder_ / shard, "symbolic link", "outside the folder"});
  fs::remove(folder_ / shard);
  fs::rename(outside / "blob", folder_ / "moved");
  fs::create_symlink("moved", folder_ / shard);
  open_checkpoint(folder_.path());
  fs::remove(folder_ / shard);
  fs::create_symlink("nowhere", folder_ / shard);
  expect_unusable(folder_, {folder_ / shard, "cannot open"});
}

TEST_F(ShardedFolder, HuggingFaceCacheLinksAreFollowed) {
  TempFolder cache;
  fs::create_directories(cache / "blobs");
  fs::create_directories(cache / "snapshots/abc123");
  for (const auto& entry : fs::directory_iterator(folder_.path())) {
    const std::string name = entry.path().filename();
    fs::copy(entry.path(), cache / ("blobs/" + name));
    fs::create_symlink("../../blobs/" + name, cache / ("snapshots/abc123/" + name));
  }
  EXPECT_EQ(open_checkpoint(cache / "snapshots/abc123").config().num_layers, 4);
  // The same link from a folder that is not under snapshots/ leaves it.
  fs::rename(cache / "snapshots", cache / "others");
  expect_bad_input({"outside the folder"}, [&] { open_checkpoint(cache / "others/abc123"); });
}

// ---- inventory ----

TEST(CheckpointInventory, MissingExtraAndMisshapenAreReportedTogether) {
  EditedCheckpoint checkpoint(SynthVariant::kBf16);
  checkpoint.edit([](auto& tensors) {
    tensors.erase("layers.0.attn.wkv.weight");
    tensors.erase("layers.2.attn_norm.weight");
    tensors["layers.4.attn.wkv.weight"] = {DType::kBf16, {1, 1}, "xx"};
    tensors.at("norm.weight").shape = {2, 48};
    tensors.at("layers.1.ffn.experts.3.w1.weight").shape = {96, 64};
    tensors.at("layers.1.attn.attn_sink").dtype = DType::kI32;
    tensors["layers.1.ffn.gate.weight"] = {DType::kF16, {5, 96}, std::string(960, 'x')};
  });
  checkpoint.expect_refused({"7 problems", "missing tensor layers.0.attn.wkv.weight", "shape [48, 96]",
                             "missing tensor layers.2.attn_norm.weight", "unexpected tensor layers.4.attn.wkv.weight",
                             "norm.weight: shape [2, 48], expected [96]",
                             "layers.1.ffn.experts.3.w1: logical shape [96, 64] (BF16), expected [64, 96]",
                             "layers.1.attn.attn_sink: dtype I32, expected F32",
                             "layers.1.ffn.gate.weight: dtype F16"});
}

TEST(CheckpointInventory, LongListsAreCutWithTheirCount) {
  EditedCheckpoint checkpoint(SynthVariant::kBf16);
  checkpoint.edit([](auto& tensors) {
    for (int i = 0; i < 80; ++i) tensors[fmt::format("extra.{}", i)] = {DType::kU8, {1}, "x"};
  });
  checkpoint.expect_refused({"80 problems", "and 30 more"});
}

TEST(CheckpointInventory, AConfigThatLiesIsContradictedByTheTensors) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kOfficial);
  const auto lie = [&](const char* key, const Json& value, std::initializer_list<std::string_view> parts) {
    const std::string honest = read_bytes(folder / "config.json");
    Json config = parse_json(honest, "config");
    config[key] = value;
    write_bytes(folder / "config.json", config.dump());
    expect_unusable(folder, parts);
    write_bytes(folder / "config.json", honest);
  };
  lie("vocab_size", 321,
      {"embed: logical shape [320, 96] (BF16), expected [321, 96]",
       "head:", "tid2eid: shape [320, 2], expected [321, 2]"});
  lie("num_hidden_layers", 3, {"unexpected tensor layers.3."});
  lie("n_routed_experts", 6, {"missing tensor layers.0.ffn.experts.5.w1.weight"});
  lie("hidden_size", 112, {"expected [320, 112]"});
  lie("hc_mult", 4, {"hc_attn_fn: shape [15, 288], expected [24, 384]"});
  lie("compress_ratios", {0, 4, 128, 4}, {"layers.2.attn.compressor.ape: shape [8, 48], expected [128, 48]"});
  lie("compress_ratios", {0, 0, 8, 4}, {"unexpected tensor layers.1.attn.indexer"});
  lie("num_hash_layers", 2, {"missing tensor layers.1.ffn.gate.tid2eid", "unexpected tensor layers.1.ffn.gate.bias"});
  lie("n_shared_experts", 0, {"unexpected tensor layers.0.ffn.shared_experts.w1.weight"});
  open_checkpoint(folder.path());
}

TEST(CheckpointInventory, DraftTensorsAreTolerated) {
  EditedCheckpoint checkpoint(SynthVariant::kOfficial);
  checkpoint.edit([](auto& tensors) {
    tensors["mtp.0.norm.weight"] = {DType::kBf16, {96}, std::string(192, 'x')};
    tensors["mtp.2.markov_head.markov_w1.weight"] = {DType::kF16, {1, 1}, "xx"};
  });
  open_checkpoint(checkpoint.folder().path());
}

TEST(CheckpointInventory, CountsOfTheReleasedModels) {
  // Logical tensors plus the stored scales of spec 7.2: Flash without its draft has 69187 - 1575 tensors.
  const auto stored = [](const char* shape, bool nvfp4) {
    int64_t count = 0;
    for (const LogicalTensor& tensor : list_tensors(parse_model_config(synth_shape_config(shape), shape))) {
      ++count;
      if (tensor.tensor_class == TensorClass::kQuantisable)
        count += tensor.role == TensorRole::kRoutedExpert && nvfp4 ? 3 : 1;
    }
    return count;
  };
  EXPECT_EQ(stored("flash", false), 69187 - 1575);
  EXPECT_EQ(stored("flash", true), 135235 - 1575);
  EXPECT_EQ(stored("pro", false), 145116 - 2343);
  EXPECT_EQ(stored("pro", true), 285660 - 2343);
}

TEST(CheckpointDemo, SharedDemoModelOpensClean) {
  const std::string folder = DSV4_SOURCE_DIR "/../shared/demo-model";
  if (!fs::exists(folder))
    GTEST_SKIP() << folder << " is absent: the BF16 demo checkpoint is not part of the repository";
  const Checkpoint checkpoint = open_checkpoint(folder);
  EXPECT_EQ(checkpoint.config().num_layers, 6);
  EXPECT_EQ(checkpoint.files().size(), 4u);
  EXPECT_FLOAT_EQ(checkpoint.generation_defaults().temperature, 0.8f);
  int64_t parameters = 0;
  for (const LogicalTensor& tensor : list_tensors(checkpoint.config())) {
    if (tensor.tensor_class == TensorClass::kExpertTable) {
      validate_expert_table(tensor.name, checkpoint.at(tensor.name), checkpoint.config().num_experts);
      continue;
    }
    parameters += num_elements(tensor.shape);
    if (!tensor.is_matrix()) continue;
    EXPECT_EQ(checkpoint.matrix(tensor.name).format, StoredFormat::kBf16) << tensor.name;
  }
  EXPECT_NEAR(static_cast<double>(parameters), 23.95e6, 0.005e6);  // as its README says
}

}  // namespace
}  // namespace dsv4
