// compress_quantize on the CPU: rows of the shifted compressor (compressor.h) and of the row codecs, in pages; chunks do not matter.
#include "ops/compressor/compress_quantize.h"

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/compress_case.h"

namespace dsv4::test {
namespace {

// What chunks of the given sizes leave.
std::unique_ptr<HostMemory> run(const Sequence& s, const Formats& formats, const std::vector<int64_t>& chunks,
                                const CpuContext& context) {
  constexpr int kStates = 3, kState = 1;  // the sequence sits in the middle one
  auto memory = std::make_unique<HostMemory>(s, formats, 2, s.num_windows(), kStates);
  reset_compressor_states(s.kind, memory->state_value.data(), memory->state_gate.data(), kStates, context);
  run_chunks(s, memory->common(s), kState, Indices(s, kState), chunks, context);
  return memory;
}

class CompressQuantize : public ::testing::Test {
 protected:
  ThreadPool pool_{2};
  CpuContext context_{pool_};
};

TEST_F(CompressQuantize, Bf16RowsAreTheShiftedCompressorsBitForBit) {
  for (const CompressorKind kind : kCompressorKinds) {
    const Sequence s(kind, test_tokens(kind));
    const auto got = run(s, {}, {0}, context_);
    const std::vector<float> want = s.rows(context_);
    for (int64_t w = 0; w < s.num_windows(); ++w) {
      const std::vector<float> row = got->bf16_row(w);
      for (int c = 0; c < s.traits.dim; ++c)
        ASSERT_EQ(row[c], want[w * s.traits.dim + c])
            << "kind " << static_cast<int>(kind) << " row " << w << " channel " << c;
    }
  }
}

TEST_F(CompressQuantize, ChunksAndSingleTokensGiveTheSamePages) {
  for (const CompressorKind kind : kCompressorKinds) {
    const Sequence s(kind, test_tokens(kind));
    const auto whole = run(s, {}, {0}, context_);
    EXPECT_EQ(run(s, {}, {1}, context_)->image, whole->image);
    EXPECT_EQ(run(s, {}, {5, 1, 1, 7}, context_)->image, whole->image);
  }
}

TEST_F(CompressQuantize, QuantisedRowsAreTheCodecsOfTheFinishedRow) {
  for (const CompressorKind kind : kCompressorKinds)
    for (const Formats& formats :
         {Formats{KvFormat::kFp8, IndexFormat::kFp8}, Formats{KvFormat::kNvfp4, IndexFormat::kFp4}}) {
      const Sequence s(kind, test_tokens(kind));
      const std::vector<float> rows = s.rows(context_);
      const auto got = run(s, formats, {0}, context_);
      for (int64_t w = 0; w < s.num_windows(); ++w) {
        const float* row = &rows[w * s.traits.dim];
        ASSERT_EQ(got->row(w), codec_row(kind, formats, {row, row + s.traits.dim})) << "row " << w;
      }
    }
}

TEST_F(CompressQuantize, SlotsOutsideThePagesAreNotStored) {
  const Sequence s(CompressorKind::kCsa, test_tokens(CompressorKind::kCsa));
  HostMemory memory(s, {}, 2, 2, 1);
  const std::vector<uint8_t> before = memory.image;
  reset_compressor_states(s.kind, memory.state_value.data(), memory.state_gate.data(), 1, context_);
  const std::vector<int32_t> rope_rows(static_cast<size_t>(s.num_windows()), 0);
  std::vector<int32_t> slots(rope_rows.size());
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = i % 2 ? -1 : 2;
  CompressPrefillArgs args{memory.common(s), 0, s.num_tokens, rope_rows.data(), slots.data()};
  compress_quantize(args, context_);
  EXPECT_EQ(memory.image, before);
  args.common.kv_format = KvFormat::kF32;
  EXPECT_THROW(compress_quantize(args, context_), Error);
}

}  // namespace
}  // namespace dsv4::test
