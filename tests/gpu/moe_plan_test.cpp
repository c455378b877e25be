// MoePlan and the kernel layout: host only.
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <vector>

#include "codec/e4m3.h"
#include "ops/moe/moe_layout.h"
#include "ops/moe/moe_plan.h"
#include "ops/moe/moe_workspace.h"

namespace dsv4 {
namespace {

MoePlanInput flash(int64_t tokens, ActFormat act = ActFormat::kBf16) {
  MoePlanInput in;
  in.num_tokens = tokens, in.hidden = 4096, in.inter = 2048, in.num_experts = 256, in.num_topk = 6, in.act = act;
  return in;
}

TEST(MoePlan, FlashChoicesByTokens) {
  for (const int64_t tokens : {1, 3}) EXPECT_EQ(plan_moe(flash(tokens)).tier, MoeTier::kRing) << tokens;
  for (const int64_t tokens : {4, 8, 64, 170}) EXPECT_EQ(plan_moe(flash(tokens)).tier, MoeTier::kStream) << tokens;
  for (const int64_t tokens : {171, 1024}) EXPECT_EQ(plan_moe(flash(tokens)).tier, MoeTier::kTiled) << tokens;
  EXPECT_EQ(plan_moe(flash(8, ActFormat::kNvfp4)).tier, MoeTier::kTiled);
  EXPECT_TRUE(plan_moe(flash(8, ActFormat::kNvfp4)).split_launch);
}

TEST(MoePlan, MatricesTooWideForTheStreamingTierAreTiled) {
  MoePlanInput in = flash(8);
  in.hidden = sm90::kStreamMaxColumns;
  EXPECT_EQ(plan_moe(in).tier, MoeTier::kStream);
  in.hidden += 64;
  EXPECT_EQ(plan_moe(in).tier, MoeTier::kTiled);
}

// Whatever the words say: blocks of the two groups that share pairs of chunks fill them, no byte twice.
TEST(MoeLayout, TwoGroupsFillTheirPairsOfChunks) {
  constexpr int kThreads = 128;
  for (const uint32_t word : {0u, 0x1ffu, 0x0a5u, 0x15au, 0x100u}) {
    std::vector<int> used(static_cast<size_t>(kMoeSlabPairBytes));
    for (const int group : {1, 3})
      for (int strip = group * kMoeGroupStrips; strip < (group + 1) * kMoeGroupStrips; ++strip)
        for (int block = 0; block < kMoeSlabBlocks; ++block) {
          const MoeBlockPlace place = moe_block_place(strip, block, moe_chunk_bits(word, group));
          for (int i = 0; i < kMoeBlockCodeBytes; ++i) ++used.at(static_cast<size_t>(place.codes + i));
          for (int i = 0; i < 2 * kThreads; ++i) ++used.at(static_cast<size_t>(place.scales + i / 2 * 4 + i % 2));
        }
    for (size_t i = 0; i < used.size(); ++i) ASSERT_EQ(used[i], 1) << "byte " << i << ", word " << word;
  }
  for (const int groups : {1, 2, 3, 5, 7, 16}) {
    std::vector<int> seen(static_cast<size_t>(groups));
    for (const int side : {0, 1})
      for (int i = 0; i < moe_groups_of_side(groups, side); ++i) {
        const int group = moe_group_of_side(side, i);
        EXPECT_EQ(moe_group_side(group), side);
        ++seen.at(static_cast<size_t>(group));
      }
    EXPECT_EQ(seen, std::vector<int>(static_cast<size_t>(groups), 1)) << groups << " groups";
  }
}

TEST(MoePlan, PrintsWhatItChoseAndForWhatWorkload) {
  const auto text = [](int64_t tokens, ActFormat act = ActFormat::kBf16) {
    return plan_moe(flash(tokens, act)).to_string();
  };
  EXPECT_EQ(text(2).rfind("ring (one to three tokens: latency): 132 CTAs", 0), 0u) << text(2);
  EXPECT_EQ(text(8).rfind("stream (decode batches: bandwidth): 132 CTAs", 0), 0u) << text(8);
  EXPECT_EQ(text(4096).rfind("tiled (prefill", 0), 0u) << text(4096);
  EXPECT_EQ(text(4096, ActFormat::kNvfp4).rfind("tiled (a4", 0), 0u) << text(4096, ActFormat::kNvfp4);
  EXPECT_NE(text(4096, ActFormat::kNvfp4).find("fc1 and fc2 apart"), std::string::npos);
}

TEST(MoePlan, SharedExpertTakesWorkspace) {
  MoePlanInput in = flash(8);
  const MoePlan without = plan_moe(in);
  in.shared_inter = 2048;
  const MoePlan with = plan_moe(in);
  EXPECT_EQ(with.tier, without.tier);
  EXPECT_EQ(with.workspace_bytes - without.workspace_bytes, 8 * 2048 * 2 + 8 * 4096 * 2);
  in.shared_inter = 2080;
  EXPECT_THROW(plan_moe(in), std::runtime_error);
}

TEST(MoePlan, SharedExpertIsInTheLaunchOfTheDecodeTiersOnly) {
  const auto plan = [](int64_t tokens, int64_t shared_inter, ActFormat act = ActFormat::kBf16) {
    MoePlanInput in = flash(tokens, act);
    in.shared_inter = shared_inter;
    return plan_moe(in);
  };
  for (const int64_t tokens : {1, 3, 4, 64, 298}) {
    EXPECT_EQ(plan(tokens, 2048).shared, MoeSharedPlace::kInLaunch) << tokens;
    EXPECT_NE(plan(tokens, 2048).to_string().find("shared expert in the launch"), std::string::npos);
  }
  for (const int64_t tokens : {299, 4096}) {
    EXPECT_EQ(plan(tokens, 2048).shared, MoeSharedPlace::kBefore) << tokens;
    EXPECT_NE(plan(tokens, 2048).to_string().find("shared expert before"), std::string::npos);
  }
  EXPECT_EQ(plan(8, 2048, ActFormat::kNvfp4).shared, MoeSharedPlace::kBefore);
  EXPECT_EQ(plan(8, 1024).shared, MoeSharedPlace::kInLaunch);  // of other size than the routed experts
  EXPECT_EQ(plan(8, 0).shared, MoeSharedPlace::kNone);
  EXPECT_EQ(plan(8, 0).to_string().find("shared expert"), std::string::npos);
}

TEST(MoePlan, ReservedSmsAreLeftFree) {
  MoePlanInput in = flash(8);
  in.reserved_sms = 2;
  EXPECT_EQ(plan_moe(in).ctas, 130);
  in.reserved_sms = 132;
  EXPECT_THROW(plan_moe(in), std::runtime_error);
}

TEST(MoePlan, ShapesTheKernelsCannotRunAreRefused) {
  MoePlanInput in = flash(8);
  in.hidden = 4096 + 32;
  EXPECT_THROW(plan_moe(in), std::runtime_error);
  in = flash(8);
  in.num_topk = 33;
  EXPECT_THROW(plan_moe(in), std::runtime_error);
  in = flash(8);
  in.num_experts = 1025;
  EXPECT_THROW(plan_moe(in), std::runtime_error);
}

// A workspace allocated for the largest call must hold every smaller one of the same tier, and its parts must not overlap.
TEST(MoePlan, WorkspacesGrowWithTokens) {
  for (const ActFormat act : {ActFormat::kBf16, ActFormat::kNvfp4})
    for (const MoeTier tier : {MoeTier::kRing, MoeTier::kStream, MoeTier::kTiled}) {
      int64_t before = 0;
      for (int64_t tokens = 0; tokens <= 32768; tokens = tokens * 2 + 1) {
        const int64_t bytes = layout_moe_workspace(flash(tokens, act), tier).bytes;
        EXPECT_GE(bytes, before);
        before = bytes;
      }
    }
}

TEST(MoeLayout, CodeBitsArePermutedWithoutLoss) {
  uint32_t seen = 0;
  for (int pair = 0; pair < 4; ++pair)
    for (const int out : {15, 8, 7, 6, 31, 24, 23, 22}) seen |= 1u << moe_code_bit(pair, out);
  EXPECT_EQ(seen, 0xffffffffu);
  for (int k = 0; k < 64; ++k) EXPECT_EQ(moe_source_column(moe_kernel_column(k)), k);
  for (int code = 1; code < 127; ++code) {  // ue5m3 of every non-zero ue4m3
    const int packed = moe_pack_sf(static_cast<uint8_t>(code));
    EXPECT_EQ(std::ldexp(1.0f + (packed & 7) / 8.0f, (packed >> 3) - 21), decode_ue4m3(static_cast<uint8_t>(code)))
        << code;
  }
}

TEST(MoeLayout, EveryRowOfAStripIsThereOnce) {
  for (const int strips : {2, 6}) {
    std::vector<int> gate(size_t(strips) * 32), down(size_t(strips) * 64);
    for (int strip = 0; strip < strips; ++strip)
      for (int warp = 0; warp < 4; ++warp) {
        for (int g = 0; g < 8; ++g) ++gate[size_t(moe_fc1_row(strip, warp, g))];
        for (int row = 0; row < 16; ++row) ++down[size_t(moe_fc2_row(strip, warp, row))];
      }
    EXPECT_EQ(gate, std::vector<int>(gate.size(), 1));
    EXPECT_EQ(down, std::vector<int>(down.size(), 1));
  }
}

}  // namespace
}  // namespace dsv4
