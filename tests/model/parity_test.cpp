// One timeline, many ways to run it: prefill, decode, any chunking, several sequences in a step, snapshots. All must agree.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <random>

#include "base/check.h"
#include "checkpoint/synth.h"
#include "model/deepseek_v4.h"

namespace dsv4 {
namespace {

constexpr float kTolerance = 1e-4f;  // in logits

std::vector<int32_t> random_ids(int64_t count, int64_t vocab, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>(rng() % static_cast<uint64_t>(vocab)));
  return ids;
}

float max_difference(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(a[i] - b[i]));
  return worst;
}

double relative_error(std::span<const float> a, std::span<const float> b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / norm);
}

class ModelUnderTest {
 public:
  explicit ModelUnderTest(const std::string& folder, Precision precision = Precision::make_exact(), int num_threads = 2,
                          CpuIsa isa = best_cpu_isa())
      : pool_(num_threads),
        model_(std::make_shared<const Checkpoint>(open_checkpoint(folder)), precision, {pool_, isa}) {}

  int64_t vocab() const { return model_.config().vocab_size; }
  DeepseekV4& operator*() { return model_; }
  SequenceCache sequence(int64_t max_chunk) const { return model_.new_sequence(max_chunk); }

  // Logits of all ids, fed in pieces of the given lengths (the last one repeats).
  std::vector<float> run(std::span<const int32_t> ids, const std::vector<int64_t>& pieces) {
    SequenceCache cache = sequence(*std::max_element(pieces.begin(), pieces.end()));
    std::vector<float> all, logits;
    for (size_t piece = 0; !ids.empty(); ++piece) {
      const auto count = std::min<size_t>(ids.size(), static_cast<size_t>(pieces[std::min(piece, pieces.size() - 1)]));
      const SequenceInput input{&cache, ids.first(count), WantLogits::kAll};
      model_.forward({&input, 1}, logits);
      all.insert(all.end(), logits.begin(), logits.end());
      ids = ids.subspan(count);
    }
    return all;
  }

 private:
  ThreadPool pool_;
  DeepseekV4 model_;
};

const std::string kBundled = DSV4_SOURCE_DIR "/models/demo";

// A small synthetic checkpoint of another shape: odd sizes, three kinds of layers, ratios 4, 16 and 0, small top-k.
std::string synth_folder(const std::string& name, SynthVariant variant, Json changes = Json::object()) {
  const std::string folder = testing::TempDir() + "/dsv4_parity_" + name;
  std::filesystem::remove_all(folder);
  SynthOptions options;
  options.config = synth_shape_config("demo");
  options.config.update(Json{{"vocab_size", 320},
                             {"hidden_size", 80},
                             {"num_hidden_layers", 5},
                             {"num_attention_heads", 6},
                             {"head_dim", 96},
                             {"qk_rope_head_dim", 32},
                             {"q_lora_rank", 48},
                             {"o_lora_rank", 32},
                             {"o_groups", 3},
                             {"moe_intermediate_size", 48},
                             {"n_routed_experts", 7},
                             {"num_experts_per_tok", 3},
                             {"num_hash_layers", 1},
                             {"compress_ratios", {0, 4, 16, 4, 0}},
                             {"sliding_window", 11},
                             {"index_n_heads", 3},
                             {"index_head_dim", 64},
                             {"index_topk", 9},
                             {"hc_mult", 3}});
  options.config.update(changes);
  options.variant = variant;
  write_synth_checkpoint(folder, options);
  return folder;
}

TEST(ModelParity, DecodeEqualsPrefillAtEveryLengthUpTo300) {
  ModelUnderTest model(kBundled);
  const auto ids = random_ids(300, model.vocab(), 1);
  // Token by token gives the logits after every length; one prefill gives them all at once.
  EXPECT_LE(max_difference(model.run(ids, {1}), model.run(ids, {300})), kTolerance);
}

TEST(ModelParity, AnyChunkingGivesTheSameLogits) {
  ModelUnderTest model(synth_folder("chunks", SynthVariant::kBf16));
  const auto ids = random_ids(210, model.vocab(), 2);
  const auto whole = model.run(ids, {210});
  for (const std::vector<int64_t>& pieces :
       {std::vector<int64_t>{1}, {2}, {3}, {5}, {7, 1}, {64}, {127, 2, 1}, {128}, {129, 4}, {200, 1, 1, 3}})
    EXPECT_LE(max_difference(model.run(ids, pieces), whole), kTolerance) << pieces[0];
}

TEST(ModelParity, PrefillThenDecodeAgreesAroundLongLengths) {
  ModelUnderTest model(kBundled);
  const auto ids = random_ids(2053, model.vocab(), 3);
  const auto whole = model.run(ids, {512});
  for (int64_t length : {512, 1024, 2048}) {
    // Prefill of length - 6 tokens, then decode across length - 5 .. length + 5.
    SequenceCache cache = model.sequence(512);
    std::vector<float> logits;
    for (int64_t at = 0; at < length + 5;) {
      const int64_t count = at < length - 6 ? std::min<int64_t>(512, length - 6 - at) : 1;
      const SequenceInput input{&cache, std::span(ids).subspan(static_cast<size_t>(at), static_cast<size_t>(count)),
                                WantLogits::kLast};
      (*model).forward({&input, 1}, logits);
      at += count;
      if (at < length - 5) continue;
      EXPECT_LE(max_difference(logits,
                               std::span(whole).subspan(static_cast<size_t>((at - 1) * model.vocab()), logits.size())),
                kTolerance)
          << "after " << at << " tokens";
    }
  }
}

TEST(ModelParity, SequencesInOneStepDoNotAffectEachOther) {
  ModelUnderTest model(synth_folder("batch", SynthVariant::kBf16));
  std::vector<std::vector<int32_t>> ids;
  std::vector<SequenceCache> caches;
  for (int s = 0; s < 3; ++s) {
    ids.push_back(random_ids(40 + 17 * s, model.vocab(), 10 + s));
    caches.push_back(model.sequence(64));
  }
  // Different progress in each step: sequence s advances by s + 2 tokens.
  std::vector<std::vector<float>> logits_of(3);
  for (size_t step = 0;; ++step) {
    std::vector<SequenceInput> inputs;
    std::vector<size_t> active;
    for (size_t s = 0; s < 3; ++s) {
      const size_t from = std::min(ids[s].size(), step * (s + 2)), count = std::min(ids[s].size() - from, s + 2);
      if (count == 0) continue;
      inputs.push_back({&caches[s], std::span(ids[s]).subspan(from, count), WantLogits::kAll});
      active.push_back(s);
    }
    if (inputs.empty()) break;
    std::vector<float> logits;
    (*model).forward(inputs, logits);
    auto next = logits.begin();
    for (size_t i = 0; i < active.size(); ++i) {
      const auto end = next + static_cast<int64_t>(inputs[i].tokens.size()) * model.vocab();
      logits_of[active[i]].insert(logits_of[active[i]].end(), next, end);
      next = end;
    }
  }
  for (size_t s = 0; s < 3; ++s) EXPECT_LE(max_difference(logits_of[s], model.run(ids[s], {64})), kTolerance) << s;
}

TEST(ModelParity, SnapshotRestoresTheTimeline) {
  ModelUnderTest model(synth_folder("snapshot", SynthVariant::kBf16));
  const auto ids = random_ids(120, model.vocab(), 4), other = random_ids(30, model.vocab(), 5);
  SequenceCache cache = model.sequence(120);
  std::vector<float> logits, expected;
  const auto feed = [&](std::span<const int32_t> tokens) {
    const SequenceInput input{&cache, tokens, WantLogits::kLast};
    (*model).forward({&input, 1}, logits);
  };
  feed(std::span(ids).first(75));
  const auto snapshot = cache.snapshot();
  feed(std::span(ids).subspan(75));
  expected = logits;
  cache.restore(snapshot);
  feed(other);
  cache.restore(snapshot);
  feed(std::span(ids).subspan(75));
  EXPECT_EQ(logits, expected);
}

TEST(ModelParity, ThreadsDoNotChangeASingleBit) {
  for (const Precision& precision :
       {Precision::make_exact(), Precision{false, ActFormat::kNvfp4, KvFormat::kNvfp4, IndexFormat::kFp4}}) {
    ModelUnderTest one(kBundled, precision, 1), three(kBundled, precision, 3);
    const auto ids = random_ids(90, one.vocab(), 6);
    EXPECT_EQ(one.run(ids, {40, 1}), three.run(ids, {40, 1}));
  }
}

TEST(ModelParity, FastPathsFollowTheReferenceInEveryPrecision) {
  for (const Precision& precision :
       {Precision::make_exact(), Precision{false, ActFormat::kBf16, KvFormat::kFp8, IndexFormat::kFp8},
        Precision{false, ActFormat::kNvfp4, KvFormat::kNvfp4, IndexFormat::kFp4}}) {
    ModelUnderTest fast(kBundled, precision), reference(kBundled, precision, 2, CpuIsa::kReference);
    const auto ids = random_ids(24, fast.vocab(), 7);
    const auto actual = fast.run(ids, {24}), expected = reference.run(ids, {24});
    if (precision.exact) {
      EXPECT_LE(max_difference(actual, expected), kTolerance);
    } else {
      // Roundings to bf16 and FP4 turn last-bit differences into steps of the format, which six layers carry on.
      EXPECT_LE(relative_error(actual, expected), 0.1);
    }
  }
}

TEST(ModelParity, EveryStorageVariantRuns) {
  const Json changes{{"hidden_size", 256}, {"moe_intermediate_size", 128}, {"q_lora_rank", 128}, {"o_lora_rank", 128}};
  const auto bf16 = [&](std::span<const int32_t> ids) {
    return ModelUnderTest(synth_folder("variant", SynthVariant::kBf16, changes)).run(ids, {64});
  };
  const auto ids = random_ids(40, 320, 8);
  const auto expected = bf16(ids);
  for (SynthVariant variant : {SynthVariant::kOfficial, SynthVariant::kModelOpt, SynthVariant::kCompressed}) {
    ModelUnderTest model(synth_folder("variant", variant, changes));
    const auto logits = model.run(ids, {64});
    const double error = relative_error(logits, expected);
    // FP8 dense and FP4 experts of random weights: some tens of percent away, but the same function.
    EXPECT_LT(error, 0.6) << static_cast<int>(variant);
    EXPECT_GT(error, 1e-4) << static_cast<int>(variant);
  }
}

TEST(ModelParity, BadTokensAreRefusedBeforeTheCacheChanges) {
  ModelUnderTest model(kBundled);
  SequenceCache cache = model.sequence(4);
  std::vector<float> logits;
  const std::vector<int32_t> bad{1, 4096};
  const SequenceInput input{&cache, bad, WantLogits::kLast};
  EXPECT_THROW((*model).forward({&input, 1}, logits), Error);
  EXPECT_EQ(cache.num_tokens(), 0);
}

}  // namespace
}  // namespace dsv4
