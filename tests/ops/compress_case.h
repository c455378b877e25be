// Shared by the tests of compress_quantize: on the CPU (tests/ops), on a GPU (tests/gpu) and of the GPU's source run on the CPU
// (tests/emulate): a sequence with its weights, the calls that run it in chunks, and rows read back from pages.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "codec/bf16.h"
#include "ops/attention/kv_view.h"
#include "ops/compressor/compress_quantize.h"
#include "ops/compressor/compressor.h"
#include "ops/indexer/indexer.h"
#include "ops/random.h"
#include "ops/rope/rope.h"

namespace dsv4::test {

constexpr CompressorKind kCompressorKinds[] = {CompressorKind::kCsa, CompressorKind::kHca, CompressorKind::kIndexer};
inline int64_t test_tokens(CompressorKind kind) { return kind == CompressorKind::kHca ? 3 * 128 + 17 : 4 * 11 + 3; }

// The projections of one sequence, and the weights.
struct Sequence {
  CompressorKind kind;
  CompressorTraits traits;
  int64_t num_tokens;
  std::vector<float> value, gate, ape, table;
  std::vector<bf16> norm;
  RopeFreqs freqs = make_rope_freqs(kKvRopeDim, 160000, nullptr);

  Sequence(CompressorKind which, int64_t tokens)
      : kind(which),
        traits(compressor_traits(which)),
        num_tokens(tokens),
        value(dsv4::random_floats(tokens * traits.width, 1)),
        gate(dsv4::random_floats(tokens * traits.width, 2)),
        ape(dsv4::random_floats(int64_t{traits.ratio} * traits.width, 3)),
        table(static_cast<size_t>((num_windows() + 1) * kKvRopeDim)) {
    for (const float w : dsv4::random_floats(traits.dim, 4)) norm.push_back(encode_bf16(w));
    for (int64_t w = 0; w <= num_windows(); ++w) {
      float* cosines = table.data() + w * kKvRopeDim;
      rope_angles(freqs, w * traits.ratio, cosines, cosines + kKvRopeDim / 2);
    }
  }
  int64_t num_windows() const { return num_tokens / traits.ratio; }

  // What compressor.h makes of it, rounded to bf16.
  std::vector<float> rows(const CpuContext& context) const {
    const CompressorShape shape{traits.ratio, kind != CompressorKind::kHca, traits.dim, kKvRopeDim};
    std::vector<float> state_value(static_cast<size_t>(shape.state_elems())), state_gate(state_value.size()),
        norm_f32(norm.size()), result(static_cast<size_t>(num_windows() * traits.dim));
    for (size_t i = 0; i < norm.size(); ++i) norm_f32[i] = decode_bf16(norm[i]);
    reset_compressor_state(shape, state_value.data(), state_gate.data());
    compress({shape, value.data(), gate.data(), ape.data(), norm_f32.data(), &freqs, state_value.data(),
              state_gate.data(), result.data(), 0, num_tokens, 1e-6f, true},
             context);
    return result;
  }
};

struct Formats {
  KvFormat kv = KvFormat::kBf16;
  IndexFormat index = IndexFormat::kBf16;
  PageLayout layout(CompressorKind kind) const {
    return kind == CompressorKind::kIndexer ? index_page_layout(index) : kv_page_layout(kv);
  }
};

// Pages without memory; a row's bytes (data, then scales, as the CPU keeps it); a bf16 row's numbers.
inline DevicePages make_pages(PageLayout layout, int rows_per_page, int64_t num_rows) {
  return {nullptr, (rows_per_page * (layout.data_bytes + layout.scale_bytes) + 15) / 16 * 16, rows_per_page,
          static_cast<int32_t>(num_rows)};
}
inline int64_t image_bytes(const DevicePages& pages) {
  return (pages.num_rows + pages.rows_per_page - 1) / pages.rows_per_page * pages.page_stride;
}
inline std::vector<uint8_t> row_bytes(const DevicePages& pages, PageLayout layout, int64_t w) {
  const auto r = static_cast<int32_t>(w);
  std::vector<uint8_t> bytes(pages.data(r, layout), pages.data(r, layout) + layout.data_bytes);
  bytes.insert(bytes.end(), pages.scales(r, layout), pages.scales(r, layout) + layout.scale_bytes);
  return bytes;
}
inline std::vector<float> bf16_row(const DevicePages& pages, PageLayout layout, int64_t w) {
  const std::vector<uint8_t> bytes = row_bytes(pages, layout, w);
  std::vector<bf16> codes(static_cast<size_t>(layout.data_bytes) / sizeof(bf16));
  std::memcpy(codes.data(), bytes.data(), codes.size() * sizeof(bf16));
  std::vector<float> x;
  for (const bf16 code : codes) x.push_back(decode_bf16(code));
  return x;
}

// The bytes that the CPU's codec makes of a finished row (keys: after its Hadamard rotation).
inline std::vector<uint8_t> codec_row(CompressorKind kind, const Formats& formats, std::vector<float> row) {
  const auto dim = static_cast<int>(row.size());
  std::vector<uint8_t> bytes;
  if (kind == CompressorKind::kIndexer) {
    const IndexKeyLayout layout{formats.index, dim};
    bytes.resize(static_cast<size_t>(layout.row_bytes()));
    if (formats.index != IndexFormat::kBf16) hadamard(row.data(), dim);
    encode_index_key(layout, row.data(), bytes.data());
  } else {
    const KvRowLayout layout{formats.kv, dim, kKvRopeDim};
    bytes.resize(static_cast<size_t>(layout.row_bytes()));
    encode_kv_row(layout, row.data(), bytes.data());
  }
  return bytes;
}

// Pooled values may round the other way once (2^-8 of them); rotation adds the partner channel's. Returns how many differ.
inline int64_t expect_close_row(const std::vector<float>& got, const std::vector<float>& want, int64_t w) {
  int64_t different = 0;
  for (size_t c = 0; c < want.size(); ++c) {
    const float size = std::max(std::fabs(want[c]), std::max(std::fabs(want[c ^ 1]), 1e-3f));
    if (!(std::fabs(got[c] - want[c]) <= size * 0x1p-6f)) {
      ADD_FAILURE() << "row " << w << " channel " << c << ": " << got[c] << ", want " << want[c];
      return 0;
    }
    different += got[c] != want[c];
  }
  return different;
}

// Arrays: a Sequence, or its arrays in other memory.
template <class Arrays>
CompressCommon compress_common(CompressorKind kind, const Arrays& arrays, float* state_value, float* state_gate,
                               const DevicePages& pages, const Formats& formats) {
  return {kind,
          arrays.value.data(),
          arrays.gate.data(),
          arrays.ape.data(),
          arrays.norm.data(),
          arrays.table.data(),
          state_value,
          state_gate,
          1e-6f,
          pages,
          formats.kv,
          formats.index};
}
inline CompressCommon from_token(CompressCommon common, const CompressorTraits& traits, int64_t token) {
  common.value += token * traits.width, common.gate += token * traits.width;
  return common;
}

// The index arrays of a sequence's calls: decode [num_tokens], prefill [num_windows + 1]. Row w is window w's.
struct Indices {
  std::vector<int32_t> positions, states, token_windows, windows;

  Indices(const Sequence& s, int32_t state) : states(static_cast<size_t>(s.num_tokens), state) {
    for (int64_t p = 0; p < s.num_tokens; ++p) {
      positions.push_back(static_cast<int32_t>(p));
      token_windows.push_back(static_cast<int32_t>(p / s.traits.ratio));
    }
    for (int64_t w = 0; w <= s.num_windows(); ++w) windows.push_back(static_cast<int32_t>(w));
  }
};

// The sequence in chunks of the given sizes, the last one repeated: a chunk of 1 uses the decode form, 0 means "the rest". common: of token
// 0 and state 0; IndexArrays: Indices, or its arrays in other memory.
template <class IndexArrays, class Context>
void run_chunks(const Sequence& s, const CompressCommon& common, int64_t state, const IndexArrays& indices,
                const std::vector<int64_t>& chunks, const Context& context) {
  int64_t first = 0;
  for (size_t i = 0; first < s.num_tokens; i = i + 1 < chunks.size() ? i + 1 : i) {
    const int64_t count = chunks[i] == 0 ? s.num_tokens - first : std::min(chunks[i], s.num_tokens - first);
    CompressCommon chunk = from_token(common, s.traits, first);
    if (chunks[i] == 1) {
      const int32_t* window = indices.token_windows.data() + first;
      compress_quantize(
          CompressDecodeArgs{chunk, indices.positions.data() + first, indices.states.data() + first, window, window, 1},
          context);
    } else {
      const int64_t state_elems = int64_t{s.traits.state_rows} * s.traits.width;
      chunk.state_value += state * state_elems, chunk.state_gate += state * state_elems;
      const int32_t* window = indices.windows.data() + first / s.traits.ratio;
      compress_quantize(CompressPrefillArgs{chunk, first, count, window, window}, context);
    }
    first += count;
  }
}

// What calls on host memory leave: pages with a poisoned one behind them, and every state.
struct HostMemory {
  Formats formats;
  PageLayout layout;
  DevicePages pages;
  std::vector<uint8_t> image;
  std::vector<float> state_value, state_gate;

  HostMemory(const Sequence& s, const Formats& f, int rows_per_page, int64_t num_rows, int64_t num_states)
      : formats(f), layout(f.layout(s.kind)), pages(make_pages(layout, rows_per_page, num_rows)) {
    pages.page_stride += 16;  // a gap
    image.assign(static_cast<size_t>(image_bytes(pages) + pages.page_stride), 0xa5);
    pages.base = image.data();
    state_value.assign(static_cast<size_t>(num_states * s.traits.state_rows * s.traits.width), 7.0f);
    state_gate = state_value;
  }
  HostMemory(const HostMemory&) = delete;
  CompressCommon common(const Sequence& s) {
    return compress_common(s.kind, s, state_value.data(), state_gate.data(), pages, formats);
  }
  std::vector<uint8_t> row(int64_t w) const { return row_bytes(pages, layout, w); }
  std::vector<float> bf16_row(int64_t w) const { return test::bf16_row(pages, layout, w); }
};

}  // namespace dsv4::test
