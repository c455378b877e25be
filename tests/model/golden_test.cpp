// The model against an independent fp32 implementation: logits, residual streams after every layer, greedy continuations.
//
// Criterion of the goldens: |logit - golden| <= 1e-3 at 99 % of the positions; every position beyond it must follow (in the
// same sequence) a top-k decision with a margin below 1e-5, and is printed.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "checkpoint/safetensors.h"
#include "checkpoint/synth.h"
#include "model/deepseek_v4.h"
#include "ops/sampling/sampling.h"

namespace dsv4 {
namespace {

const std::string kBundled = DSV4_SOURCE_DIR "/models/demo";
const std::string kShared = DSV4_SOURCE_DIR "/../shared";

#define SKIP_WITHOUT_SHARED() \
  if (!std::filesystem::exists(kShared + "/demo-model/config.json")) GTEST_SKIP() << "needs ../shared/demo-model"

std::vector<int32_t> ids_of(const TensorView& view) {
  return {view.as<int64_t>(), view.as<int64_t>() + view.elements()};
}

class GoldenModel {
 public:
  explicit GoldenModel(const std::string& folder)
      : pool_(2),
        model_(std::make_shared<const Checkpoint>(open_checkpoint(folder)), Precision::make_exact(),
               {pool_, best_cpu_isa()}) {}

  DeepseekV4& operator*() { return model_; }
  int64_t vocab() const { return model_.config().vocab_size; }

  // Logits of all tokens, with the margins of their decisions.
  std::vector<float> logits(const std::vector<int32_t>& ids, std::vector<float>& margins, StepObserver observer = {}) {
    SequenceCache cache = model_.new_sequence(static_cast<int64_t>(ids.size()));
    observer.decision_margin = &margins;
    std::vector<float> logits;
    const SequenceInput input{&cache, ids, WantLogits::kAll};
    model_.forward({&input, 1}, logits, &observer);
    return logits;
  }

  std::vector<int32_t> greedy(std::vector<int32_t> ids, size_t total) {
    SequenceCache cache = model_.new_sequence(static_cast<int64_t>(ids.size()));
    std::vector<float> logits;
    SequenceInput input{&cache, ids, WantLogits::kLast};
    model_.forward({&input, 1}, logits);
    while (ids.size() < total) {
      ids.push_back(argmax(logits));
      input.tokens = std::span(ids).last(1);
      model_.forward({&input, 1}, logits);
    }
    return ids;
  }

 private:
  ThreadPool pool_;
  DeepseekV4 model_;
};

void expect_golden_logits(const std::vector<float>& logits, const TensorView& golden, int64_t first,
                          const std::vector<float>& margins) {
  const int64_t count = golden.shape[0], vocab = golden.shape[1];
  int64_t beyond = 0;
  for (int64_t i = 0; i < count; ++i) {
    double worst = 0;
    for (int64_t v = 0; v < vocab; ++v)
      worst = std::max(
          worst, std::fabs(static_cast<double>(logits[(first + i) * vocab + v]) - golden.as<float>()[i * vocab + v]));
    if (worst <= 1e-3) continue;
    ++beyond;
    const float margin = *std::min_element(margins.begin(), margins.begin() + first + i + 1);
    EXPECT_LT(margin, 1e-5f) << "position " << first + i << " is off by " << worst << " and no near-tie came before it";
    std::printf("position %lld: off by %g after a decision margin of %g\n", static_cast<long long>(first + i), worst,
                margin);
  }
  EXPECT_LE(beyond * 100, count);
}

TEST(GoldenModel, BundledNvfp4WeightsGiveTheIndependentLogits) {
  GoldenModel model(kBundled);
  const SafetensorsFile golden(DSV4_SOURCE_DIR "/tests/golden/model/demo_nvfp4.safetensors");
  const auto ids = ids_of(golden.at("input_ids"));
  std::vector<float> margins;
  const auto logits = model.logits(ids, margins);
  expect_golden_logits(logits, golden.at("logits_last16"), static_cast<int64_t>(ids.size()) - 16, margins);
}

TEST(GoldenModel, Bf16LogitsAndStreamsAfterEveryLayer) {
  SKIP_WITHOUT_SHARED();
  GoldenModel model(kShared + "/demo-model");
  const SafetensorsFile golden(kShared + "/golden/demo.safetensors");
  const auto ids = ids_of(golden.at("input_ids"));
  const TensorView& streams = golden.at("layer_streams_first192");  // [layers, 192, num_hc, hidden]
  const int64_t checked = streams.shape[1], width = streams.shape[2] * streams.shape[3];
  StepObserver observer;
  observer.on_layer = [&](int layer, const float* actual, int64_t) {
    for (int64_t t = 0; t < checked; ++t) {
      const float* expected = streams.as<float>() + (layer * checked + t) * width;
      double difference = 0, norm = 0;
      for (int64_t i = 0; i < width; ++i) {
        difference += std::pow(static_cast<double>(actual[t * width + i]) - expected[i], 2);
        norm += std::pow(static_cast<double>(expected[i]), 2);
      }
      ASSERT_LE(std::sqrt(difference / norm), 1e-4) << "layer " << layer << ", token " << t;
    }
  };
  std::vector<float> margins;
  const auto logits = model.logits(ids, margins, observer);
  expect_golden_logits(logits, golden.at("logits_first64"), 0, margins);
  expect_golden_logits(logits, golden.at("logits_last256"), static_cast<int64_t>(ids.size()) - 256, margins);
  for (size_t t = 0; t < ids.size(); ++t) {
    const auto row =
        std::span(logits).subspan(t * static_cast<size_t>(model.vocab()), static_cast<size_t>(model.vocab()));
    ASSERT_EQ(argmax(row), golden.at("argmax").as<int64_t>()[t]) << "position " << t;
  }
}

TEST(GoldenModel, GreedyContinuationsAreIdentical) {
  SKIP_WITHOUT_SHARED();
  GoldenModel model(kShared + "/demo-model");
  const SafetensorsFile golden(kShared + "/golden/demo.safetensors");
  for (const std::string name : {"greedy", "greedy0", "greedy1", "greedy2"}) {
    const auto expected = ids_of(golden.at(name + "_ids"));
    const auto prompt_len = golden.at(name + "_prompt_len").as<int64_t>()[0];
    EXPECT_EQ(model.greedy({expected.begin(), expected.begin() + prompt_len}, expected.size()), expected) << name;
  }
}

TEST(GoldenModel, QuantisedInMemoryVariantsMatchTheirGoldens) {
  SKIP_WITHOUT_SHARED();
  GoldenModel model(kBundled);
  const SafetensorsFile golden(kShared + "/golden/demo-quantised.safetensors");
  const auto ids = ids_of(golden.at("input_ids"));
  std::vector<float> margins;
  expect_golden_logits(model.logits(ids, margins), golden.at("nvfp4-all.logits_last64"),
                       static_cast<int64_t>(ids.size()) - 64, margins);
  GoldenModel bf16(kShared + "/demo-model");
  expect_golden_logits(bf16.logits(ids, margins), golden.at("bf16.logits_last64"),
                       static_cast<int64_t>(ids.size()) - 64, margins);
}

// Unusual dimensions (odd_configs.json) against scripts/reference_model.py, a float64 implementation without cache or chunks.
TEST(GoldenModel, UnusualConfigurationsMatchTheFloat64Reference) {
  const std::string golden_folder = DSV4_SOURCE_DIR "/tests/golden/model";
  const SafetensorsFile golden(golden_folder + "/odd_configs.safetensors");
  const Json cases = read_json_file(golden_folder + "/odd_configs.json");
  for (size_t number = 0; number < cases.size(); ++number) {
    const std::string folder = testing::TempDir() + "/dsv4_odd_config";
    std::filesystem::remove_all(folder);
    SynthOptions options;
    options.config = read_json_file(kBundled + "/config.json");
    options.config.update(cases[number]);
    options.config.erase("quantization_config");
    if (options.config["rope_scaling"].is_null()) options.config.erase("rope_scaling");
    write_synth_checkpoint(folder, options);
    GoldenModel model(folder);
    const auto ids = ids_of(golden.at(fmt::format("{}.input_ids", number)));
    std::vector<float> margins;
    const auto logits = model.logits(ids, margins);
    expect_golden_logits(logits, golden.at(fmt::format("{}.logits_last8", number)),
                         static_cast<int64_t>(ids.size()) - 8, margins);
  }
}

}  // namespace
}  // namespace dsv4
