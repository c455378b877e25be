// The source of compress_quantize, run on the CPU, against its CPU form: rows, pages, state. tests/gpu/compress_quantize_test.cpp asks a GPU
// the same.
#include "ops/compressor/compress_quantize_cuda.cu"  // NOLINT: the kernels themselves

#include <gtest/gtest.h>

#include "ops/compress_case.h"

namespace dsv4::test {
namespace {

constexpr int kStates = 3, kState = 1;  // the sequence sits in the middle one

template <class T>
void expect_same_bytes(const char* what, const std::vector<T>& got, const std::vector<T>& want) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < got.size(); ++i)
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) {
      ADD_FAILURE() << what << ": first difference at " << i << " of " << got.size() << ": " << +got[i] << ", want "
                    << +want[i];
      return;
    }
}
void expect_same_state(const HostMemory& got, const HostMemory& want) {
  expect_same_bytes("state's values", got.state_value, want.state_value);
  expect_same_bytes("state's gates", got.state_gate, want.state_gate);
}

// What chunks of the given sizes leave. Context: GpuContext (emulated) or CpuContext.
template <class Context>
std::unique_ptr<HostMemory> run(const Sequence& s, const Formats& formats, const std::vector<int64_t>& chunks,
                                const Context& context, int rows_per_page = 2) {
  auto memory = std::make_unique<HostMemory>(s, formats, rows_per_page, s.num_windows(), kStates);
  ThreadPool pool(1);
  reset_compressor_states(s.kind, memory->state_value.data(), memory->state_gate.data(), kStates, CpuContext{pool});
  run_chunks(s, memory->common(s), kState, Indices(s, kState), chunks, context);
  return memory;
}

// Decode up to, at and behind the ends of windows; HCA: not from the start to the end, which takes long.
std::vector<int64_t> decode_chunks(CompressorKind kind) {
  if (kind != CompressorKind::kHca) return {1};
  return {125, 1, 1, 1, 1, 1, 125, 1, 1, 1, 0};
}

TEST(EmulatedCompressQuantize, RowsAreTheCpusUpToOneBf16StepAndTheStateIsEqual) {
  ThreadPool pool;
  for (const CompressorKind kind : kCompressorKinds)
    for (const bool decode : {false, true}) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + (decode ? ", decode" : ", prefill"));
      const Sequence s(kind, test_tokens(kind));
      const std::vector<int64_t> chunks = decode ? decode_chunks(kind) : std::vector<int64_t>{0};
      const auto got = run(s, {}, chunks, GpuContext{}), want = run(s, {}, chunks, CpuContext{pool});
      int64_t different = 0;
      for (int64_t w = 0; w < s.num_windows(); ++w)
        different += expect_close_row(got->bf16_row(w), want->bf16_row(w), w);
      EXPECT_LT(static_cast<double>(different), 0.003 * static_cast<double>(s.num_windows() * s.traits.dim));
      expect_same_state(*got, *want);
    }
}

TEST(EmulatedCompressQuantize, DecodeAndAnyChunkingGiveThePrefillsBytesAndState) {
  for (const CompressorKind kind : kCompressorKinds) {
    const Sequence s(kind, test_tokens(kind));
    const Formats formats{KvFormat::kNvfp4, IndexFormat::kFp4};
    const auto whole = run(s, formats, {0}, GpuContext{});
    for (const std::vector<int64_t>& chunks :
         {decode_chunks(kind), {3, 0}, {4, 1, 1, 2, 0}, {130, 1, 1, 5, 0}, {2, 7, 1, 9, 3, 1, 0}}) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", first chunk " + std::to_string(chunks[0]));
      for (const int num_sms :
           {132, 0}) {  // a decode call that starts all at once, and a long one: two orders of loads
        const auto got = run(s, formats, chunks, GpuContext{.num_sms = num_sms});
        expect_same_bytes("pages", got->image, whole->image);
        expect_same_state(*got, *whole);
      }
    }
  }
}

TEST(EmulatedCompressQuantize, CacheRowsEqualTheCpuCodecOfTheFinishedRow) {
  for (const CompressorKind kind : {CompressorKind::kCsa, CompressorKind::kHca}) {
    const Sequence s(kind, test_tokens(kind));
    const auto rows = run(s, {}, {0}, GpuContext{});
    for (const auto& [format, rows_per_page] : {std::pair{KvFormat::kFp8, 64}, {KvFormat::kNvfp4, 2}}) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", format " +
                   std::to_string(static_cast<int>(format)));
      const auto got = run(s, {format, IndexFormat::kBf16}, {0}, GpuContext{}, rows_per_page);
      for (int64_t w = 0; w < s.num_windows(); ++w)
        expect_same_bytes("row", got->row(w), codec_row(kind, {format, IndexFormat::kBf16}, rows->bf16_row(w)));
    }
  }
}

TEST(EmulatedCompressQuantize, IndexKeysEqualTheCpuHadamardAndCodecOfTheFinishedRow) {
  const Sequence s(CompressorKind::kIndexer, test_tokens(CompressorKind::kIndexer));
  const auto rows = run(s, {}, {0}, GpuContext{});
  for (const IndexFormat format : {IndexFormat::kFp8, IndexFormat::kFp4}) {
    SCOPED_TRACE("format " + std::to_string(static_cast<int>(format)));
    const auto got = run(s, {KvFormat::kBf16, format}, {0}, GpuContext{}, 64);
    for (int64_t w = 0; w < s.num_windows(); ++w)
      expect_same_bytes("key", got->row(w), codec_row(s.kind, {KvFormat::kBf16, format}, rows->bf16_row(w)));
  }
}

// One call for sequences in every situation: a window completes or does not, its row is stored or its slot lies outside the pages.
TEST(EmulatedCompressQuantize, DecodeOfManySequencesTouchesOnlyTheirStatesAndRows) {
  ThreadPool pool;
  const CpuContext cpu{pool};
  for (const CompressorKind kind : kCompressorKinds)
    for (const Formats& formats :
         {Formats{}, Formats{KvFormat::kFp8, IndexFormat::kFp8}, Formats{KvFormat::kNvfp4, IndexFormat::kFp4}})
      for (const int num_sms : {132, 0}) {  // as above
        SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", format " +
                     std::to_string(static_cast<int>(formats.kv)) + ", multiprocessors " + std::to_string(num_sms));
        const int ratio = compressor_traits(kind).ratio;
        const Sequence s(kind, std::max(6, ratio));  // angles for two windows
        const std::vector<int32_t> positions = {ratio - 1,     5 * ratio,     2 * ratio - 1,
                                                3 * ratio - 1, 3 * ratio - 2, 4 * ratio - 1},
                                   states = {4, 0, 2, 5, 1, 3}, rope_rows = {0, 1, 1, 0, 1, 1},
                                   slots = {3, 0, -1, 4, 1, 2};  // of four rows
        constexpr int64_t kRows = 4, kAllStates = 7;
        HostMemory got(s, formats, 2, kRows, kAllStates), want(s, formats, 2, kRows, kAllStates);
        want.state_value = random_floats(static_cast<int64_t>(want.state_value.size()), 1);
        want.state_gate = random_floats(static_cast<int64_t>(want.state_gate.size()), 2);
        const int64_t first_window_state = int64_t{states[0]} * s.traits.state_rows * s.traits.width;
        reset_compressor_states(kind, want.state_value.data() + first_window_state,
                                want.state_gate.data() + first_window_state, 1, cpu);
        got.state_value = want.state_value, got.state_gate = want.state_gate;
        const auto args = [&](HostMemory& memory) {
          return CompressDecodeArgs{memory.common(s), positions.data(), states.data(),
                                    rope_rows.data(), slots.data(),     static_cast<int64_t>(positions.size())};
        };
        compress_quantize(args(got), GpuContext{.num_sms = num_sms});
        compress_quantize(args(want), cpu);
        expect_same_state(got, want);
        // Everything but rows 2 and 3 is as it was.
        const std::vector<uint8_t> row(static_cast<size_t>(got.layout.data_bytes + got.layout.scale_bytes), 0xa5);
        for (const int r : {2, 3}) {
          if (formats.kv == KvFormat::kBf16) expect_close_row(got.bf16_row(r), want.bf16_row(r), r);
          EXPECT_NE(got.row(r), row);
          std::copy_n(row.begin(), got.layout.data_bytes, got.pages.data(r, got.layout));
          std::copy_n(row.begin(), got.layout.scale_bytes, got.pages.scales(r, got.layout));
        }
        expect_same_bytes("pages", got.image, std::vector<uint8_t>(got.image.size(), 0xa5));
      }
}

TEST(EmulatedCompressQuantize, ResetStatesAreTheCpus) {
  ThreadPool pool;
  for (const CompressorKind kind : kCompressorKinds) {
    const Sequence s(kind, 1);
    HostMemory got(s, {}, 2, 1, kStates + 1), want(s, {}, 2, 1, kStates + 1);
    reset_compressor_states(kind, got.state_value.data(), got.state_gate.data(), kStates, GpuContext{});
    reset_compressor_states(kind, want.state_value.data(), want.state_gate.data(), kStates, CpuContext{pool});
    expect_same_state(got, want);
  }
}

}  // namespace
}  // namespace dsv4::test
