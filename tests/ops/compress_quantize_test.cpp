// compress_quantize on the CPU: rows of the shifted compressor (compressor.h) and of the row codecs, in pages; chunks do not matter.
#include "ops/compressor/compress_quantize.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "base/check.h"
#include "ops/attention/kv_view.h"
#include "ops/compressor/compressor.h"
#include "ops/indexer/indexer.h"
#include "ops/op_test_util.h"

namespace dsv4::test {
namespace {

constexpr int kRowsPerPage = 2;

struct Sequence {
  CompressorKind kind;
  CompressorTraits traits;
  int64_t num_tokens;
  std::vector<float> value, gate, ape, norm, table;
  std::vector<bf16> norm_bf16;
  RopeFreqs freqs = make_rope_freqs(kKvRopeDim, 160000, nullptr);

  explicit Sequence(CompressorKind which)
      : kind(which),
        traits(compressor_traits(which)),
        num_tokens(which == CompressorKind::kHca ? 2 * 128 + 17 : 4 * 7 + 3) {
    std::mt19937 rng(7);
    value = random_floats(rng, num_tokens * traits.width, 1.0f, false);
    gate = random_floats(rng, num_tokens * traits.width, 1.0f, false);
    ape = random_floats(rng, traits.ratio * traits.width, 1.0f, false);
    norm = random_floats(rng, traits.dim, 1.0f, true);
    for (const float w : norm) norm_bf16.push_back(encode_bf16(w));
    table.resize(static_cast<size_t>((num_windows() + 1) * kKvRopeDim));
    for (int64_t w = 0; w <= num_windows(); ++w)
      rope_angles(freqs, w * traits.ratio, &table[w * kKvRopeDim], &table[w * kKvRopeDim + kKvRopeDim / 2]);
  }
  int64_t num_windows() const { return num_tokens / traits.ratio; }

  // What compressor.h makes of it, rounded to bf16.
  std::vector<float> rows(const CpuContext& context) const {
    const CompressorShape shape{traits.ratio, kind != CompressorKind::kHca, traits.dim, kKvRopeDim};
    std::vector<float> state_value(static_cast<size_t>(shape.state_elems())), state_gate(state_value.size()),
        result(static_cast<size_t>(num_windows() * traits.dim));
    reset_compressor_state(shape, state_value.data(), state_gate.data());
    compress({shape, value.data(), gate.data(), ape.data(), norm.data(), &freqs, state_value.data(), state_gate.data(),
              result.data(), 0, num_tokens, 1e-6f, true},
             context);
    return result;
  }
};

struct Formats {
  KvFormat kv = KvFormat::kBf16;
  IndexFormat index = IndexFormat::kBf16;
};

PageLayout layout_of(const Sequence& s, const Formats& formats) {
  return s.kind == CompressorKind::kIndexer ? index_page_layout(formats.index) : kv_page_layout(formats.kv);
}
DevicePages pages_of(std::vector<uint8_t>& image, const Sequence& s, const Formats& formats, int32_t num_rows) {
  const PageLayout layout = layout_of(s, formats);
  const int64_t stride = (kRowsPerPage * (layout.data_bytes + layout.scale_bytes) + 15) / 16 * 16;
  if (image.empty()) image.assign(static_cast<size_t>((num_rows + kRowsPerPage - 1) / kRowsPerPage * stride), 0xa5);
  return {image.data(), stride, kRowsPerPage, num_rows};
}

// The page image after chunks of the given sizes (the last repeats); a chunk of 1 takes the decode form.
std::vector<uint8_t> run(const Sequence& s, const Formats& formats, const std::vector<int64_t>& chunks,
                         const CpuContext& context) {
  std::vector<uint8_t> image;
  const DevicePages pages = pages_of(image, s, formats, static_cast<int32_t>(s.num_windows()));
  const int64_t state_elems = int64_t{s.traits.state_rows} * s.traits.width;
  std::vector<float> state_value(static_cast<size_t>(3 * state_elems)), state_gate(state_value.size());
  reset_compressor_states(s.kind, state_value.data(), state_gate.data(), 3, context);
  std::vector<int32_t> windows;
  for (int64_t w = 0; w <= s.num_windows(); ++w) windows.push_back(static_cast<int32_t>(w));
  int64_t first = 0;
  for (size_t i = 0; first < s.num_tokens; i = i + 1 < chunks.size() ? i + 1 : i) {
    const int64_t count = std::min(chunks[i], s.num_tokens - first), window = first / s.traits.ratio;
    CompressCommon common{s.kind,
                          &s.value[first * s.traits.width],
                          &s.gate[first * s.traits.width],
                          s.ape.data(),
                          s.norm_bf16.data(),
                          s.table.data(),
                          state_value.data(),
                          state_gate.data(),
                          1e-6f,
                          pages,
                          formats.kv,
                          formats.index};
    if (count == 1) {
      const int32_t position = static_cast<int32_t>(first), state = 1;
      compress_quantize(CompressDecodeArgs{common, &position, &state, &windows[window], &windows[window], 1}, context);
    } else {
      common.state_value += state_elems, common.state_gate += state_elems;
      compress_quantize(CompressPrefillArgs{common, first, count, &windows[window], &windows[window]}, context);
    }
    first += count;
  }
  return image;
}

const CompressorKind kKinds[] = {CompressorKind::kCsa, CompressorKind::kHca, CompressorKind::kIndexer};

class CompressQuantize : public ::testing::Test {
 protected:
  ThreadPool pool_{2};
  CpuContext context_{pool_};
};

TEST_F(CompressQuantize, Bf16RowsAreTheShiftedCompressorsBitForBit) {
  for (const CompressorKind kind : kKinds) {
    const Sequence s(kind);
    std::vector<uint8_t> image = run(s, {}, {s.num_tokens}, context_);
    const DevicePages pages = pages_of(image, s, {}, static_cast<int32_t>(s.num_windows()));
    const std::vector<float> want = s.rows(context_);
    for (int64_t w = 0; w < s.num_windows(); ++w)
      for (int c = 0; c < s.traits.dim; ++c) {
        bf16 got;
        std::memcpy(&got, pages.data(static_cast<int32_t>(w), layout_of(s, {})) + 2 * c, 2);
        ASSERT_EQ(decode_bf16(got), want[w * s.traits.dim + c])
            << "kind " << static_cast<int>(kind) << " row " << w << " channel " << c;
      }
  }
}

TEST_F(CompressQuantize, ChunksAndSingleTokensGiveTheSamePages) {
  for (const CompressorKind kind : kKinds) {
    const Sequence s(kind);
    const std::vector<uint8_t> whole = run(s, {}, {s.num_tokens}, context_);
    EXPECT_EQ(run(s, {}, {1}, context_), whole);
    EXPECT_EQ(run(s, {}, {5, 1, 1, 7}, context_), whole);
  }
}

TEST_F(CompressQuantize, QuantisedRowsAreTheCodecsOfTheFinishedRow) {
  for (const CompressorKind kind : kKinds)
    for (const Formats& formats :
         {Formats{KvFormat::kFp8, IndexFormat::kFp8}, Formats{KvFormat::kNvfp4, IndexFormat::kFp4}}) {
      const Sequence s(kind);
      std::vector<float> rows = s.rows(context_);
      std::vector<uint8_t> image = run(s, formats, {s.num_tokens}, context_);
      const PageLayout page = layout_of(s, formats);
      const DevicePages pages = pages_of(image, s, formats, static_cast<int32_t>(s.num_windows()));
      for (int64_t w = 0; w < s.num_windows(); ++w) {
        float* row = &rows[w * s.traits.dim];
        std::vector<uint8_t> want(static_cast<size_t>(page.data_bytes + page.scale_bytes), 0);
        if (kind == CompressorKind::kIndexer) {
          hadamard(row, s.traits.dim);
          encode_index_key({formats.index, s.traits.dim}, row, want.data());
        } else {
          encode_kv_row({formats.kv, s.traits.dim, kKvRopeDim}, row, want.data());
        }
        ASSERT_EQ(std::memcmp(pages.data(static_cast<int32_t>(w), page), want.data(), page.data_bytes), 0)
            << "row " << w;
        ASSERT_EQ(
            std::memcmp(pages.scales(static_cast<int32_t>(w), page), want.data() + page.data_bytes, page.scale_bytes),
            0)
            << "row " << w;
      }
    }
}

TEST_F(CompressQuantize, SlotsOutsideThePagesAreNotStored) {
  const Sequence s(CompressorKind::kCsa);
  std::vector<uint8_t> image;
  const DevicePages pages = pages_of(image, s, {}, 2);
  const std::vector<uint8_t> before = image;
  std::vector<float> state_value(8 * 1024, 0.0f), state_gate(state_value.size());
  reset_compressor_states(s.kind, state_value.data(), state_gate.data(), 1, context_);
  const std::vector<int32_t> rope_rows(static_cast<size_t>(s.num_windows()), 0);
  std::vector<int32_t> slots(rope_rows.size());
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = i % 2 ? -1 : 2;
  const CompressCommon common{s.kind,          s.value.data(),     s.gate.data(),     s.ape.data(), s.norm_bf16.data(),
                              s.table.data(),  state_value.data(), state_gate.data(), 1e-6f,        pages,
                              KvFormat::kBf16, IndexFormat::kBf16};
  compress_quantize(CompressPrefillArgs{common, 0, s.num_tokens, rope_rows.data(), slots.data()}, context_);
  EXPECT_EQ(image, before);
  CompressCommon binary32 = common;
  binary32.kv_format = KvFormat::kF32;
  EXPECT_THROW(
      compress_quantize(CompressPrefillArgs{binary32, 0, s.num_tokens, rope_rows.data(), slots.data()}, context_),
      Error);
}

}  // namespace
}  // namespace dsv4::test
