// compress_quantize against compressor.h, prefill against decode, and its cache formats against the CPU's row codec.
#include <algorithm>
#include <limits>

#include "gpu/gpu_test.h"
#include "ops/attention/kv_view.h"
#include "ops/compressor/compressor.h"
#include "ops/compressor/compressor_gpu.h"
#include "ops/indexer/indexer.h"
#include "ops/rope/rope.h"

namespace dsv4::test {
namespace {

struct Sequence {
  CompressorKind kind;
  CompressorTraits traits;
  int64_t num_tokens;
  std::vector<float> value, gate, ape, table, norm;
  std::vector<bf16> norm_bf16;
  RopeFreqs freqs;

  Sequence(CompressorKind which, int64_t tokens) : kind(which), traits(compressor_traits(which)), num_tokens(tokens) {
    std::mt19937 random(static_cast<uint32_t>(tokens));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t count) {
      x.resize(static_cast<size_t>(count));
      for (float& v : x) v = normal(random);
    };
    fill(value, tokens * traits.width);
    fill(gate, tokens * traits.width);
    fill(ape, traits.ratio * traits.width);
    fill(norm, traits.dim);
    norm_bf16 = to_bf16(norm);
    for (int i = 0; i < traits.dim; ++i) norm[i] = decode_bf16(norm_bf16[i]);
    freqs = make_rope_freqs(kKvRopeDim, 160000, nullptr);
    table.resize(static_cast<size_t>((num_windows() + 1) * kKvRopeDim));
    for (int64_t w = 0; w <= num_windows(); ++w)
      rope_angles(freqs, w * traits.ratio, &table[w * kKvRopeDim], &table[w * kKvRopeDim + kKvRopeDim / 2]);
  }
  int64_t num_windows() const { return num_tokens / traits.ratio; }

  std::vector<float> cpu_rows(const CpuContext& cpu) const {
    const CompressorShape shape{traits.ratio, kind != CompressorKind::kHca, traits.dim, kKvRopeDim};
    std::vector<float> state_value(static_cast<size_t>(shape.state_elems())), state_gate(state_value.size()),
        rows(static_cast<size_t>(num_windows() * traits.dim));
    reset_compressor_state(shape, state_value.data(), state_gate.data());
    compress({shape, value.data(), gate.data(), ape.data(), norm.data(), &freqs, state_value.data(), state_gate.data(),
              rows.data(), 0, num_tokens, 1e-6f, true},
             cpu);
    return rows;
  }
};

struct Formats {
  KvFormat kv = KvFormat::kBf16;
  IndexFormat index = IndexFormat::kBf16;
};

// The page image after running the sequence in chunks of the given sizes; a chunk of 1 uses the decode form, 0 means "the rest".
std::vector<uint8_t> gpu_pages(Machine& machine, const Sequence& s, const Formats& formats,
                               const std::vector<int64_t>& chunks, int rows_per_page = 2) {
  const PageLayout layout =
      s.kind == CompressorKind::kIndexer ? index_page_layout(formats.index) : kv_page_layout(formats.kv);
  DevicePages pages{nullptr, (rows_per_page * (layout.data_bytes + layout.scale_bytes) + 15) / 16 * 16, rows_per_page,
                    static_cast<int32_t>(s.num_windows())};
  const int64_t num_pages = (s.num_windows() + rows_per_page - 1) / rows_per_page;
  DeviceArray<uint8_t> image(machine, std::vector<uint8_t>(static_cast<size_t>(num_pages * pages.page_stride), 0xa5));
  pages.base = image.data();
  DeviceArray<float> value(machine, s.value), gate(machine, s.gate), ape(machine, s.ape), table(machine, s.table);
  DeviceArray<bf16> norm(machine, s.norm_bf16);
  constexpr int kStates = 3, kState = 1;  // the sequence sits in the middle one
  const int64_t state_elems = int64_t{s.traits.state_rows} * s.traits.width;
  DeviceArray<float> state_value(machine, kStates * state_elems), state_gate(machine, kStates * state_elems);
  reset_compressor_states(s.kind, state_value.data(), state_gate.data(), kStates, machine.gpu);
  std::vector<int32_t> windows;
  for (int64_t w = 0; w <= s.num_windows(); ++w) windows.push_back(static_cast<int32_t>(w));
  DeviceArray<int32_t> window_ids(machine, windows);
  std::vector<int32_t> positions, states, token_windows;
  for (int64_t p = 0; p < s.num_tokens; ++p) {
    positions.push_back(static_cast<int32_t>(p));
    states.push_back(kState);
    token_windows.push_back(static_cast<int32_t>(p / s.traits.ratio));
  }
  DeviceArray<int32_t> device_positions(machine, positions), device_states(machine, states),
      device_token_windows(machine, token_windows);
  int64_t first = 0;
  for (size_t i = 0; first < s.num_tokens; i = i + 1 < chunks.size() ? i + 1 : i) {
    const int64_t count = chunks[i] == 0 ? s.num_tokens - first : std::min(chunks[i], s.num_tokens - first);
    CompressCommon common{s.kind,
                          value.data() + first * s.traits.width,
                          gate.data() + first * s.traits.width,
                          ape.data(),
                          norm.data(),
                          table.data(),
                          state_value.data(),
                          state_gate.data(),
                          1e-6f,
                          pages,
                          formats.kv,
                          formats.index};
    if (chunks[i] == 1) {
      compress_quantize(CompressDecodeArgs{common, device_positions.data() + first, device_states.data() + first,
                                           device_token_windows.data() + first, device_token_windows.data() + first, 1},
                        machine.gpu);
    } else {
      common.state_value += kState * state_elems;
      common.state_gate += kState * state_elems;
      const int64_t window = first / s.traits.ratio;
      compress_quantize(
          CompressPrefillArgs{common, first, count, window_ids.data() + window, window_ids.data() + window},
          machine.gpu);
    }
    first += count;
  }
  return image.host();
}

// Bytes of row w as the CPU keeps them: data, then scales.
std::vector<uint8_t> row_bytes(std::vector<uint8_t>& image, PageLayout layout, int rows_per_page, int64_t w) {
  DevicePages pages{image.data(), (rows_per_page * (layout.data_bytes + layout.scale_bytes) + 15) / 16 * 16,
                    rows_per_page, 1 << 30};
  const auto row = static_cast<int32_t>(w);
  std::vector<uint8_t> bytes(pages.data(row, layout), pages.data(row, layout) + layout.data_bytes);
  bytes.insert(bytes.end(), pages.scales(row, layout), pages.scales(row, layout) + layout.scale_bytes);
  return bytes;
}

std::vector<float> bf16_rows(Machine& machine, const Sequence& s, const std::vector<int64_t>& chunks) {
  std::vector<uint8_t> image = gpu_pages(machine, s, {}, chunks);
  const PageLayout layout =
      s.kind == CompressorKind::kIndexer ? index_page_layout(IndexFormat::kBf16) : kv_page_layout(KvFormat::kBf16);
  std::vector<float> rows;
  for (int64_t w = 0; w < s.num_windows(); ++w) {
    const std::vector<uint8_t> bytes = row_bytes(image, layout, 2, w);
    for (int c = 0; c < s.traits.dim; ++c) {
      bf16 value;
      std::memcpy(&value, &bytes[2 * c], 2);
      rows.push_back(decode_bf16(value));
    }
  }
  return rows;
}

const CompressorKind kKinds[] = {CompressorKind::kCsa, CompressorKind::kHca, CompressorKind::kIndexer};
int64_t test_tokens(CompressorKind kind) { return kind == CompressorKind::kHca ? 3 * 128 + 17 : 4 * 11 + 3; }

TEST(GpuCompressQuantize, RowsEqualTheCpuCompressorUpToOneBf16StepOfTheNorm) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const CompressorKind kind : kKinds) {
    SCOPED_TRACE(static_cast<int>(kind));
    const Sequence s(kind, test_tokens(kind));
    const std::vector<float> got = bf16_rows(machine, s, {0}), want = s.cpu_rows(machine.cpu);
    ASSERT_EQ(got.size(), want.size());
    int64_t different = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      // A pooled value may round the other way once (2^-8 of it); rotation adds the partner channel's.
      const float size = std::max(std::fabs(want[i]), std::max(std::fabs(want[i ^ 1]), 1e-3f));
      ASSERT_NEAR(got[i], want[i], size * 0x1p-6f) << "row " << i / s.traits.dim << " channel " << i % s.traits.dim;
      different += got[i] != want[i];
    }
    EXPECT_LT(static_cast<double>(different) / static_cast<double>(got.size()), 0.01);
  }
}

TEST(GpuCompressQuantize, DecodeAndAnyChunkingGiveThePrefillsBytes) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const CompressorKind kind : kKinds) {
    const Sequence s(kind, test_tokens(kind));
    const Formats formats{KvFormat::kNvfp4, IndexFormat::kFp4};
    const std::vector<uint8_t> whole = gpu_pages(machine, s, formats, {0});
    for (const std::vector<int64_t>& chunks :
         {std::vector<int64_t>{1}, {3, 0}, {4, 1, 1, 2, 0}, {130, 1, 1, 5, 0}, {2, 7, 1, 9, 3, 1, 0}}) {
      SCOPED_TRACE(std::to_string(static_cast<int>(kind)) + " first chunk " + std::to_string(chunks[0]));
      expect_same_bytes(gpu_pages(machine, s, formats, chunks), whole, "pages");
    }
  }
}

// Short calls read the state and the indices before the predecessor is done (compressor_gpu.h), long ones (here: of a machine without
// multiprocessors) after. Two sequences take turns, so that no call reads what the one before it writes.
TEST(GpuCompressQuantize, DependentDecodeOfAlternatingSequencesGivesThePrefillsBytes) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const CompressorKind kind : kKinds)
    for (const bool early : {true, false}) {
      SCOPED_TRACE(std::to_string(static_cast<int>(kind)) + (early ? " early" : " late"));
      const Sequence s(kind, test_tokens(kind));
      const Formats formats{KvFormat::kNvfp4, IndexFormat::kFp4};
      const std::vector<uint8_t> want = gpu_pages(machine, s, formats, {0});
      const PageLayout layout =
          kind == CompressorKind::kIndexer ? index_page_layout(formats.index) : kv_page_layout(formats.kv);
      constexpr int kRowsPerPage = 2;
      DevicePages pages{nullptr, (kRowsPerPage * (layout.data_bytes + layout.scale_bytes) + 15) / 16 * 16, kRowsPerPage,
                        static_cast<int32_t>(s.num_windows())};
      DeviceArray<float> value(machine, s.value), gate(machine, s.gate), ape(machine, s.ape), table(machine, s.table);
      DeviceArray<bf16> norm(machine, s.norm_bf16);
      const int64_t state_elems = int64_t{s.traits.state_rows} * s.traits.width;
      DeviceArray<float> state_value(machine, 2 * state_elems), state_gate(machine, 2 * state_elems);
      DeviceArray<uint8_t> first_image(machine, std::vector<uint8_t>(want.size(), 0xa5)),
          second_image(machine, std::vector<uint8_t>(want.size(), 0xa5));
      reset_compressor_states(kind, state_value.data(), state_gate.data(), 2, machine.gpu);
      std::vector<int32_t> positions, windows;
      for (int64_t p = 0; p < s.num_tokens; ++p) {
        positions.push_back(static_cast<int32_t>(p));
        windows.push_back(static_cast<int32_t>(p / s.traits.ratio));
      }
      DeviceArray<int32_t> device_positions(machine, positions), device_windows(machine, windows),
          states(machine, std::vector<int32_t>{0, 1});
      GpuContext context = machine.gpu;
      context.dependent = true;
      if (!early) context.num_sms = 0;
      for (int64_t p = 0; p < s.num_tokens; ++p)
        for (const int sequence : {0, 1}) {
          pages.base = sequence == 0 ? first_image.data() : second_image.data();
          const CompressCommon common{kind,
                                      value.data() + p * s.traits.width,
                                      gate.data() + p * s.traits.width,
                                      ape.data(),
                                      norm.data(),
                                      table.data(),
                                      state_value.data(),
                                      state_gate.data(),
                                      1e-6f,
                                      pages,
                                      formats.kv,
                                      formats.index};
          compress_quantize(CompressDecodeArgs{common, device_positions.data() + p, states.data() + sequence,
                                               device_windows.data() + p, device_windows.data() + p, 1},
                            context);
        }
      expect_same_bytes(first_image.host(), want, "first sequence");
      expect_same_bytes(second_image.host(), want, "second sequence");
    }
}

TEST(GpuCompressQuantize, CacheRowsEqualTheCpuCodecOfTheFinishedRow) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const CompressorKind kind : {CompressorKind::kCsa, CompressorKind::kHca}) {
    const Sequence s(kind, test_tokens(kind));
    const std::vector<float> rows = bf16_rows(machine, s, {0});
    for (const KvFormat format : {KvFormat::kFp8, KvFormat::kNvfp4})
      for (const int rows_per_page : {2, 64}) {
        std::vector<uint8_t> image = gpu_pages(machine, s, {format, IndexFormat::kBf16}, {0}, rows_per_page);
        const KvRowLayout layout{format, kKvHeadDim, kKvRopeDim};
        for (int64_t w = 0; w < s.num_windows(); ++w) {
          std::vector<uint8_t> want(static_cast<size_t>(layout.row_bytes()));
          encode_kv_row(layout, &rows[w * kKvHeadDim], want.data());
          expect_same_bytes(row_bytes(image, kv_page_layout(format), rows_per_page, w), want, "row");
        }
      }
  }
}

TEST(GpuCompressQuantize, IndexKeysEqualTheCpuHadamardAndCodecOfTheFinishedRow) {
  DSV4_NEEDS_GPU();
  Machine machine;
  const Sequence s(CompressorKind::kIndexer, test_tokens(CompressorKind::kIndexer));
  const std::vector<float> rows = bf16_rows(machine, s, {0});
  for (const IndexFormat format : {IndexFormat::kFp8, IndexFormat::kFp4}) {
    std::vector<uint8_t> image = gpu_pages(machine, s, {KvFormat::kBf16, format}, {0}, 64);
    const IndexKeyLayout layout{format, kIndexKeyDim};
    for (int64_t w = 0; w < s.num_windows(); ++w) {
      std::vector<float> key(rows.begin() + w * kIndexKeyDim, rows.begin() + (w + 1) * kIndexKeyDim);
      hadamard(key.data(), kIndexKeyDim);
      std::vector<uint8_t> want(static_cast<size_t>(layout.row_bytes()));
      encode_index_key(layout, key.data(), want.data());
      expect_same_bytes(row_bytes(image, index_page_layout(format), 64, w), want, "key");
    }
  }
}

}  // namespace
}  // namespace dsv4::test
