// The source of compress_quantize, run on the CPU, against its CPU form: rows, pages, state. tests/gpu/compress_quantize_test.cpp asks a GPU
// the same.
#include "ops/compressor/compress_quantize_cuda.cu"  // NOLINT: the kernels themselves

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "codec/bf16.h"
#include "ops/attention/kv_view.h"
#include "ops/indexer/indexer.h"
#include "ops/rope/rope.h"

namespace dsv4::test {
namespace {

constexpr float kEps = 1e-6f;
constexpr int kStates = 3, kState = 1;  // the sequence sits in the middle one

// The projections of one sequence and the weights.
struct Sequence {
  CompressorKind kind;
  CompressorTraits traits;
  int64_t num_tokens;
  std::vector<float> value, gate, ape, table;
  std::vector<bf16> norm;

  Sequence(CompressorKind which, int64_t tokens) : kind(which), traits(compressor_traits(which)), num_tokens(tokens) {
    std::mt19937 random(static_cast<uint32_t>(tokens));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t count) {
      x.resize(static_cast<size_t>(count));
      for (float& v : x) v = normal(random);
    };
    fill(value, tokens * traits.width);
    fill(gate, tokens * traits.width);
    fill(ape, int64_t{traits.ratio} * traits.width);
    for (int i = 0; i < traits.dim; ++i) norm.push_back(encode_bf16(normal(random)));
    const RopeFreqs freqs = make_rope_freqs(kKvRopeDim, 160000, nullptr);
    table.resize(static_cast<size_t>((num_windows() + 1) * kKvRopeDim));
    for (int64_t w = 0; w <= num_windows(); ++w) {
      float* cosines = table.data() + w * kKvRopeDim;
      rope_angles(freqs, w * traits.ratio, cosines, cosines + kKvRopeDim / 2);
    }
  }
  int64_t num_windows() const { return num_tokens / traits.ratio; }
};

struct Formats {
  KvFormat kv = KvFormat::kBf16;
  IndexFormat index = IndexFormat::kBf16;
  PageLayout layout(CompressorKind kind) const {
    return kind == CompressorKind::kIndexer ? index_page_layout(index) : kv_page_layout(kv);
  }
};

// What a run leaves: pages with a poisoned one behind them, and every state.
struct Memory {
  Formats formats;
  PageLayout layout;
  DevicePages pages;
  std::vector<uint8_t> image;
  std::vector<float> state_value, state_gate;

  Memory(const Sequence& s, const Formats& f, int rows_per_page, int64_t num_rows, int64_t num_states)
      : formats(f), layout(f.layout(s.kind)) {
    pages.page_stride = (rows_per_page * (layout.data_bytes + layout.scale_bytes) + 15) / 16 * 16 + 16;
    pages.rows_per_page = rows_per_page;
    pages.num_rows = static_cast<int32_t>(num_rows);
    image.assign(static_cast<size_t>((num_rows / rows_per_page + 2) * pages.page_stride), 0xa5);
    pages.base = image.data();
    state_value.assign(static_cast<size_t>(num_states * s.traits.state_rows * s.traits.width), 7.0f);
    state_gate = state_value;
  }
  Memory(const Memory&) = delete;
  CompressCommon common(const Sequence& s, int64_t first_token) {
    return {s.kind,
            s.value.data() + first_token * s.traits.width,
            s.gate.data() + first_token * s.traits.width,
            s.ape.data(),
            s.norm.data(),
            s.table.data(),
            state_value.data(),
            state_gate.data(),
            kEps,
            pages,
            formats.kv,
            formats.index};
  }
  // Data, then scales, as the CPU keeps a row.
  std::vector<uint8_t> row(int64_t w) const {
    const auto r = static_cast<int32_t>(w);
    std::vector<uint8_t> bytes(pages.data(r, layout), pages.data(r, layout) + layout.data_bytes);
    bytes.insert(bytes.end(), pages.scales(r, layout), pages.scales(r, layout) + layout.scale_bytes);
    return bytes;
  }
  std::vector<float> bf16_row(int64_t w) const {
    const std::vector<uint8_t> bytes = row(w);
    std::vector<float> x;
    for (size_t i = 0; i < bytes.size(); i += 2) {
      bf16 value;
      std::memcpy(&value, &bytes[i], 2);
      x.push_back(decode_bf16(value));
    }
    return x;
  }
};

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
void expect_same_state(const Memory& got, const Memory& want) {
  expect_same_bytes("state's values", got.state_value, want.state_value);
  expect_same_bytes("state's gates", got.state_gate, want.state_gate);
}

// The sequence in chunks of the given sizes, the last one repeated: a chunk of 1 uses the decode form, 0 means "the rest". Context: GpuContext
// (emulated) or CpuContext.
template <class Context>
std::unique_ptr<Memory> run_chunks(const Sequence& s, const Formats& formats, const std::vector<int64_t>& chunks,
                                   const Context& context, int rows_per_page = 2) {
  auto memory = std::make_unique<Memory>(s, formats, rows_per_page, s.num_windows(), kStates);
  ThreadPool pool(1);
  reset_compressor_states(s.kind, memory->state_value.data(), memory->state_gate.data(), kStates, CpuContext{pool});
  std::vector<int32_t> windows;
  for (int64_t w = 0; w <= s.num_windows(); ++w) windows.push_back(static_cast<int32_t>(w));
  int64_t first = 0;
  for (size_t i = 0; first < s.num_tokens; i = i + 1 < chunks.size() ? i + 1 : i) {
    const int64_t count = chunks[i] == 0 ? s.num_tokens - first : std::min(chunks[i], s.num_tokens - first);
    CompressCommon common = memory->common(s, first);
    const int32_t* window = windows.data() + first / s.traits.ratio;
    if (chunks[i] == 1) {
      const auto position = static_cast<int32_t>(first), state = int32_t{kState};
      compress_quantize(CompressDecodeArgs{common, &position, &state, window, window, 1}, context);
    } else {
      common.state_value += int64_t{kState} * s.traits.state_rows * s.traits.width;
      common.state_gate += int64_t{kState} * s.traits.state_rows * s.traits.width;
      compress_quantize(CompressPrefillArgs{common, first, count, window, window}, context);
    }
    first += count;
  }
  return memory;
}

// Pooled values may round the other way once (2^-8 of them); rotation adds the partner channel's. Returns how many differ.
int64_t expect_close_row(const Memory& got, const Memory& want, int64_t w) {
  const std::vector<float> x = got.bf16_row(w), y = want.bf16_row(w);
  int64_t different = 0;
  for (size_t c = 0; c < y.size(); ++c) {
    const float size = std::max(std::fabs(y[c]), std::max(std::fabs(y[c ^ 1]), 1e-3f));
    if (!(std::fabs(x[c] - y[c]) <= size * 0x1p-6f)) {
      ADD_FAILURE() << "row " << w << " channel " << c << ": " << x[c] << ", want " << y[c];
      return 0;
    }
    different += x[c] != y[c];
  }
  return different;
}

constexpr CompressorKind kKinds[] = {CompressorKind::kCsa, CompressorKind::kHca, CompressorKind::kIndexer};
int64_t test_tokens(CompressorKind kind) { return kind == CompressorKind::kHca ? 3 * 128 + 17 : 4 * 11 + 3; }
// Decode up to, at and behind the ends of windows; HCA: not from the start to the end, which takes long.
std::vector<int64_t> decode_chunks(CompressorKind kind) {
  if (kind != CompressorKind::kHca) return {1};
  return {125, 1, 1, 1, 1, 1, 125, 1, 1, 1, 0};
}

TEST(EmulatedCompressQuantize, RowsAreTheCpusUpToOneBf16StepAndTheStateIsEqual) {
  ThreadPool pool;
  for (const CompressorKind kind : kKinds)
    for (const bool decode : {false, true}) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + (decode ? ", decode" : ", prefill"));
      const Sequence s(kind, test_tokens(kind));
      const std::vector<int64_t> chunks = decode ? decode_chunks(kind) : std::vector<int64_t>{0};
      const auto got = run_chunks(s, {}, chunks, GpuContext{}), want = run_chunks(s, {}, chunks, CpuContext{pool});
      int64_t different = 0;
      for (int64_t w = 0; w < s.num_windows(); ++w) different += expect_close_row(*got, *want, w);
      EXPECT_LT(static_cast<double>(different), 0.003 * static_cast<double>(s.num_windows() * s.traits.dim));
      expect_same_state(*got, *want);
    }
}

TEST(EmulatedCompressQuantize, DecodeAndAnyChunkingGiveThePrefillsBytesAndState) {
  for (const CompressorKind kind : kKinds) {
    const Sequence s(kind, test_tokens(kind));
    const Formats formats{KvFormat::kNvfp4, IndexFormat::kFp4};
    const auto whole = run_chunks(s, formats, {0}, GpuContext{});
    for (const std::vector<int64_t>& chunks :
         {decode_chunks(kind), {3, 0}, {4, 1, 1, 2, 0}, {130, 1, 1, 5, 0}, {2, 7, 1, 9, 3, 1, 0}}) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", first chunk " + std::to_string(chunks[0]));
      for (const int num_sms :
           {132, 0}) {  // a decode call that starts all at once, and a long one: two orders of loads
        const auto got = run_chunks(s, formats, chunks, GpuContext{.num_sms = num_sms});
        expect_same_bytes("pages", got->image, whole->image);
        expect_same_state(*got, *whole);
      }
    }
  }
}

TEST(EmulatedCompressQuantize, CacheRowsEqualTheCpuCodecOfTheFinishedRow) {
  for (const CompressorKind kind : {CompressorKind::kCsa, CompressorKind::kHca}) {
    const Sequence s(kind, test_tokens(kind));
    const auto rows = run_chunks(s, {}, {0}, GpuContext{});
    for (const auto& [format, rows_per_page] : {std::pair{KvFormat::kFp8, 64}, {KvFormat::kNvfp4, 2}}) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", format " +
                   std::to_string(static_cast<int>(format)));
      const auto got = run_chunks(s, {format, IndexFormat::kBf16}, {0}, GpuContext{}, rows_per_page);
      const KvRowLayout layout{format, kKvHeadDim, kKvRopeDim};
      for (int64_t w = 0; w < s.num_windows(); ++w) {
        std::vector<uint8_t> want(static_cast<size_t>(layout.row_bytes()));
        encode_kv_row(layout, rows->bf16_row(w).data(), want.data());
        expect_same_bytes("row", got->row(w), want);
      }
    }
  }
}

TEST(EmulatedCompressQuantize, IndexKeysEqualTheCpuHadamardAndCodecOfTheFinishedRow) {
  const Sequence s(CompressorKind::kIndexer, test_tokens(CompressorKind::kIndexer));
  const auto rows = run_chunks(s, {}, {0}, GpuContext{});
  for (const IndexFormat format : {IndexFormat::kFp8, IndexFormat::kFp4}) {
    SCOPED_TRACE("format " + std::to_string(static_cast<int>(format)));
    const auto got = run_chunks(s, {KvFormat::kBf16, format}, {0}, GpuContext{}, 64);
    const IndexKeyLayout layout{format, kIndexKeyDim};
    for (int64_t w = 0; w < s.num_windows(); ++w) {
      std::vector<float> key = rows->bf16_row(w);
      hadamard(key.data(), kIndexKeyDim);
      std::vector<uint8_t> want(static_cast<size_t>(layout.row_bytes()));
      encode_index_key(layout, key.data(), want.data());
      expect_same_bytes("key", got->row(w), want);
    }
  }
}

// One call for sequences in every situation: a window completes or does not, its row is stored or its slot lies outside the pages.
TEST(EmulatedCompressQuantize, DecodeOfManySequencesTouchesOnlyTheirStatesAndRows) {
  ThreadPool pool;
  const CpuContext cpu{pool};
  for (const CompressorKind kind : kKinds)
    for (const Formats& formats :
         {Formats{}, Formats{KvFormat::kFp8, IndexFormat::kFp8}, Formats{KvFormat::kNvfp4, IndexFormat::kFp4}}) {
      SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", format " +
                   std::to_string(static_cast<int>(formats.kv)));
      const Sequence s(kind, 5);
      const int ratio = s.traits.ratio;
      const std::vector<int32_t> positions = {ratio - 1, 5 * ratio, 2 * ratio - 1, 3 * ratio - 1, 3 * ratio - 2},
                                 states = {4, 0, 2, 5, 1}, rope_rows = {0, 1, 1, 0, 1},
                                 slots = {3, 0, -1, 4, 1};  // of four rows
      constexpr int64_t kRows = 4, kAllStates = 6;
      Memory got(s, formats, 2, kRows, kAllStates), want(s, formats, 2, kRows, kAllStates);
      std::mt19937 random(1);
      std::normal_distribution<float> normal;
      for (size_t i = 0; i < want.state_value.size(); ++i)
        want.state_value[i] = normal(random), want.state_gate[i] = normal(random);
      const int64_t first_window_state = int64_t{states[0]} * s.traits.state_rows * s.traits.width;
      reset_compressor_states(kind, want.state_value.data() + first_window_state,
                              want.state_gate.data() + first_window_state, 1, cpu);
      got.state_value = want.state_value, got.state_gate = want.state_gate;
      const auto args = [&](Memory& memory) {
        return CompressDecodeArgs{memory.common(s, 0), positions.data(), states.data(),
                                  rope_rows.data(),    slots.data(),     static_cast<int64_t>(positions.size())};
      };
      compress_quantize(args(got), GpuContext{});
      compress_quantize(args(want), cpu);
      expect_same_state(got, want);
      if (formats.kv == KvFormat::kBf16) expect_close_row(got, want, 3);
      // Everything but row 3 is as it was.
      const std::vector<uint8_t> row(static_cast<size_t>(got.layout.data_bytes + got.layout.scale_bytes), 0xa5);
      EXPECT_NE(got.row(3), row);
      std::copy_n(row.begin(), got.layout.data_bytes, got.pages.data(3, got.layout));
      std::copy_n(row.begin(), got.layout.scale_bytes, got.pages.scales(3, got.layout));
      expect_same_bytes("pages", got.image, std::vector<uint8_t>(got.image.size(), 0xa5));
    }
}

TEST(EmulatedCompressQuantize, ResetStatesAreTheCpus) {
  ThreadPool pool;
  for (const CompressorKind kind : kKinds) {
    const Sequence s(kind, 1);
    Memory got(s, {}, 2, 1, kStates + 1), want(s, {}, 2, 1, kStates + 1);
    reset_compressor_states(kind, got.state_value.data(), got.state_gate.data(), kStates, GpuContext{});
    reset_compressor_states(kind, want.state_value.data(), want.state_gate.data(), kStates, CpuContext{pool});
    expect_same_state(got, want);
  }
}

}  // namespace
}  // namespace dsv4::test
