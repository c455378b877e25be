// Inspection: the numbers of spec 1.1 and 6, sums that add up, and broken folders.
#include "checkpoint/inspect.h"

#include <numeric>

#include "checkpoint/checkpoint.h"
#include "checkpoint_test_util.h"

namespace dsv4 {
namespace {

const KvCost& cost_of(const std::vector<KvCost>& costs, std::string_view kv, std::string_view index) {
  for (const KvCost& cost : costs)
    if (cost.kv == kv && cost.index == index) return cost;
  throw std::runtime_error("no such cost");
}

TEST(Inspect, CachePerTokenMatchesTheSpecificationTable) {
  const auto flash = kv_costs(parse_model_config(synth_shape_config("flash"), "flash"));
  const auto pro = kv_costs(parse_model_config(synth_shape_config("pro"), "pro"));
  struct Row {
    const char *kv, *index;
    int64_t row_bytes, key_bytes;
    double flash, pro;  // growing bytes per token, spec 6.2, one decimal
  };
  for (const Row& row : {Row{"bf16", "bf16", 1024, 256, 6880.0, 9848.0}, Row{"fp8", "fp8", 584, 132, 3850.3, 5511.4},
                         Row{"fp8", "fp4", 584, 68, 3514.3, 5031.4}, Row{"nvfp4", "fp4", 384, 68, 2433.0, 3483.0}}) {
    const KvCost& f = cost_of(flash, row.kv, row.index);
    EXPECT_EQ(f.row_bytes, row.row_bytes);
    EXPECT_EQ(f.index_key_bytes, row.key_bytes);
    EXPECT_NEAR(f.growing_bytes_per_token, row.flash, 0.051);
    EXPECT_NEAR(cost_of(pro, row.kv, row.index).growing_bytes_per_token, row.pro, 0.051);
    // 2^20 is a multiple of every ratio: the total is exact.
    EXPECT_EQ(f.at[2].context, 1 << 20);
    EXPECT_EQ(f.at[2].bytes - f.fixed_bytes, static_cast<int64_t>(f.growing_bytes_per_token * (1 << 20)));
  }
  // Spec 6.1: states 12.21 MB and rings of FP8 entries 3.21 MB in Flash (bf16 5.64 MB); Pro 18.71, 4.56 and 8.00 MB.
  EXPECT_NEAR(cost_of(flash, "fp8", "fp8").fixed_bytes / 1e6, 12.21 + 3.21, 0.011);
  EXPECT_NEAR(cost_of(flash, "bf16", "bf16").fixed_bytes / 1e6, 12.21 + 5.64, 0.011);
  EXPECT_NEAR(cost_of(pro, "fp8", "fp8").fixed_bytes / 1e6, 18.71 + 4.56, 0.011);
  EXPECT_NEAR(cost_of(pro, "bf16", "bf16").fixed_bytes / 1e6, 18.71 + 8.00, 0.011);
}

TEST(Inspect, ParametersMatchTheReleasedModels) {
  // Spec 1.1: 284.33e9 / 13.27e9 and 1572.997e9 / 48.85e9.
  const ParameterCount flash = count_parameters(parse_model_config(synth_shape_config("flash"), "flash"));
  EXPECT_NEAR(flash.total / 1e9, 284.33, 0.01);
  EXPECT_NEAR(flash.active / 1e9, 13.27, 0.01);
  const ParameterCount pro = count_parameters(parse_model_config(synth_shape_config("pro"), "pro"));
  EXPECT_NEAR(pro.total / 1e9, 1572.997, 0.01);
  EXPECT_NEAR(pro.active / 1e9, 48.85, 0.01);
}

TEST(Inspect, BytesAddUpInEveryVariant) {
  for (SynthVariant variant :
       {SynthVariant::kBf16, SynthVariant::kOfficial, SynthVariant::kModelOpt, SynthVariant::kCompressed}) {
    TempFolder folder;
    write_tiny(folder.path(), variant, 100000);
    const InspectReport report = inspect_checkpoint(folder.path());
    EXPECT_TRUE(report.usable) << report.problems.text();
    const Checkpoint checkpoint = open_checkpoint(folder.path());
    int64_t bytes = 0;
    for (const auto& file : checkpoint.files())
      for (const auto& [name, tensor] : file->tensors()) bytes += tensor.bytes();
    EXPECT_EQ(report.bytes, bytes);
    EXPECT_EQ(std::accumulate(report.bytes_by_role.begin(), report.bytes_by_role.end(), int64_t{0}), bytes);
    int64_t by_format = 0;
    for (const auto& [format, count] : report.bytes_by_format) by_format += count;
    EXPECT_EQ(by_format, bytes);
    EXPECT_EQ(report.unknown_bytes, 0);
    EXPECT_EQ(report.num_layers_by_kind[0], 1);
    EXPECT_EQ(report.num_layers_by_kind[1], 2);
    EXPECT_EQ(report.num_layers_by_kind[2], 1);
  }
}

TEST(Inspect, VariantIsNamed) {
  for (const auto& [variant, name] :
       {std::pair{SynthVariant::kBf16, "BF16"}, std::pair{SynthVariant::kOfficial, "official"},
        std::pair{SynthVariant::kModelOpt, "ModelOpt NVFP4"},
        std::pair{SynthVariant::kCompressed, "compressed-tensors NVFP4"}}) {
    TempFolder folder;
    write_tiny(folder.path(), variant);
    EXPECT_TRUE(inspect_checkpoint(folder.path()).variant.starts_with(std::string(name) + " ("));
  }
}

TEST(Inspect, ExpertBytesOfNvfp4AreNineSixteenthsOfAByteEach) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kModelOpt);
  const InspectReport report = inspect_checkpoint(folder.path());
  const int64_t experts = 4 * 5, elements = 3 * 64 * 96;
  const int64_t expected = experts * (elements / 2 + elements / 16 + 3 * 2 * 4);
  EXPECT_EQ(report.bytes_by_role[static_cast<size_t>(TensorRole::kRoutedExpert)], expected);
  EXPECT_EQ(report.bytes_by_format.at("NVFP4 ModelOpt"), expected);
}

TEST(Inspect, NanScalesAndWrongExpertsAreProblems) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kModelOpt);
  EditableFile file(folder / "model.safetensors");
  file.tensors.at("layers.2.ffn.experts.1.w2.weight_scale").bytes[9] = '\x7f';
  file.tensors.at("layers.0.ffn.gate.tid2eid").bytes[8] = 5;
  file.save();
  const InspectReport report = inspect_checkpoint(folder.path());
  EXPECT_FALSE(report.usable);
  ASSERT_EQ(report.problems.count(), 2) << report.problems.text();
  EXPECT_NE(report.problems.text().find("layers.2.ffn.experts.1.w2: scale at row 2, group 1 is 0x7f"),
            std::string::npos);
  EXPECT_NE(report.problems.text().find("layers.0.ffn.gate.tid2eid: expert 5 for token 0"), std::string::npos);
  EXPECT_NE(report.problems.text().find(folder / "model.safetensors"), std::string::npos);
}

TEST(Inspect, DraftAndUnknownTensorsAreCountedApart) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kOfficial);
  EditableFile file(folder / "model.safetensors");
  file.tensors["mtp.0.norm.weight"] = {DType::kBf16, {96}, std::string(192, 'x')};
  file.tensors["surprise"] = {DType::kU8, {7}, "1234567"};
  file.save();
  const InspectReport report = inspect_checkpoint(folder.path());
  EXPECT_EQ(report.bytes_by_role[static_cast<size_t>(TensorRole::kMtp)], 192);
  EXPECT_EQ(report.unknown_bytes, 7);
  EXPECT_EQ(report.problems.count(), 1);
  EXPECT_NE(inspect_text(report).find("unexpected"), std::string::npos);
}

TEST(Inspect, BrokenFoldersAreReportedNotThrown) {
  TempFolder folder;
  InspectReport report = inspect_checkpoint(folder / "absent");
  EXPECT_FALSE(report.usable);
  EXPECT_NE(inspect_text(report).find("not a folder"), std::string::npos);
  EXPECT_EQ(inspect_json(report)["model"], nullptr);

  write_tiny(folder / "m", SynthVariant::kBf16);
  write_bytes(folder / "m/config.json", "{");
  report = inspect_checkpoint(folder / "m");
  EXPECT_FALSE(report.usable);
  EXPECT_FALSE(report.has_config);
  EXPECT_GT(report.bytes_by_format.at("BF16"), 0) << "the weights can still be measured";
  EXPECT_NE(inspect_text(report).find("NOT USABLE, 1 problem"), std::string::npos);

  std::filesystem::remove_all(folder / "m");
  write_tiny(folder / "m", SynthVariant::kBf16);
  write_bytes(folder / "m/model.safetensors", "{}");
  report = inspect_checkpoint(folder / "m");
  EXPECT_FALSE(report.usable);
  EXPECT_TRUE(report.has_config) << "the cache can still be estimated";
  EXPECT_EQ(report.kv.size(), 9u);
}

TEST(Inspect, TextAndJsonSayTheSame) {
  TempFolder folder;
  write_tiny(folder.path(), SynthVariant::kModelOpt);
  const InspectReport report = inspect_checkpoint(folder.path());
  const std::string text = inspect_text(report);
  for (const char* part :
       {"ModelOpt NVFP4", "4: 1 window, 2 CSA, 1 HCA; 1 hash-routed", "5 routed per layer, 2 per token",
        "routed experts", "hyper-connections", "FP8 block", "--kv", "no problems found"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  const Json json = inspect_json(report);
  EXPECT_EQ(json["usable"], true);
  EXPECT_EQ(json["bytes"], report.bytes);
  EXPECT_EQ(json["bytes_by_kind"]["routed experts"],
            report.bytes_by_role[static_cast<size_t>(TensorRole::kRoutedExpert)]);
  EXPECT_EQ(json["model"]["layers"]["CSA"], 2);
  EXPECT_EQ(json["model"]["kv_cache"].size(), 9u);
  EXPECT_EQ(json["model"]["kv_cache"][0]["at"][0]["context"], 4096);
  EXPECT_EQ(json["problems"].size(), 0u);
}

}  // namespace
}  // namespace dsv4
