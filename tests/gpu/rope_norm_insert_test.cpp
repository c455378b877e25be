// rope_norm_insert and gather_kv_rows: the bytes of the CPU ops (rms_norm, rope_rotate, encode_kv_row), page by page.
#include <algorithm>

#include "gpu/gpu_test.h"
#include "ops/attention/kv_view.h"
#include "ops/norm/norm.h"
#include "ops/rope/rope.h"
#include "ops/rope/rope_gpu.h"

namespace dsv4::test {
namespace {

constexpr int kDim = kKvHeadDim, kRope = kKvRopeDim;

std::vector<float> widen(const std::vector<bf16>& x) {
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = decode_bf16(x[i]);
  return y;
}

std::vector<float> cos_sin_table(int positions) {
  const YarnParams yarn{16, 65536, 32, 1};
  const RopeFreqs freqs = make_rope_freqs(kRope, 160000, &yarn);
  std::vector<float> table(static_cast<size_t>(positions * kRope));
  for (int p = 0; p < positions; ++p) rope_angles(freqs, p * 37, &table[p * kRope], &table[p * kRope + kRope / 2]);
  return table;
}

// Scatters a contiguous CPU row into a page image.
void place_row(std::vector<uint8_t>& image, const DevicePages& shape, KvFormat format, int32_t row,
               const std::vector<uint8_t>& bytes) {
  const PageLayout layout = kv_page_layout(format);
  DevicePages host = shape;
  host.base = image.data();
  std::copy_n(bytes.data(), layout.data_bytes, host.data(row, layout));
  std::fill_n(host.scales(row, layout), layout.scale_bytes, uint8_t{0});
  std::copy(bytes.begin() + layout.data_bytes, bytes.end(), host.scales(row, layout));
}

struct Inserted {
  std::vector<bf16> q;
  std::vector<uint8_t> pages;
};

TEST(GpuRopeNormInsert, QueriesAndCacheRowsEqualTheCpuOps) {
  DSV4_NEEDS_GPU();
  Machine machine;
  constexpr int kPositions = 50;
  const std::vector<float> table = cos_sin_table(kPositions);
  DeviceArray<float> device_table(machine, table);
  for (const KvFormat format : {KvFormat::kBf16, KvFormat::kFp8, KvFormat::kNvfp4})
    for (const auto& [tokens, heads] : {std::pair<int64_t, int>{1, 64}, {9, 128}, {130, 3}, {70, 0}, {301, 64}}) {
      SCOPED_TRACE(std::to_string(tokens) + " tokens, " + std::to_string(heads) + " heads, format " +
                   std::to_string(static_cast<int>(format)));
      const std::vector<bf16> q = to_bf16(random_rows(tokens * std::max(heads, 1), kDim, 1)),
                              kv = to_bf16(random_rows(tokens, kDim + 8, 2));
      const std::vector<bf16> weight = to_bf16(random_rows(1, kDim, 3));
      std::vector<int32_t> rope_rows, slots;
      for (int64_t t = 0; t < tokens; ++t) {
        rope_rows.push_back(static_cast<int32_t>(t * 7 % kPositions));
        slots.push_back(t % 5 == 3 ? -1 : t % 11 == 7 ? 1 << 20 : static_cast<int32_t>((t * 29 + 3) % 256));
      }
      const PageLayout layout = kv_page_layout(format);
      DevicePages pages{nullptr, (64 * (layout.data_bytes + layout.scale_bytes) + 575) / 576 * 576, 64, 256};

      std::vector<float> want_q = widen(q), want_kv(static_cast<size_t>(tokens * kDim));
      for (int64_t t = 0; t < tokens; ++t)
        for (int c = 0; c < kDim; ++c) want_kv[t * kDim + c] = decode_bf16(kv[t * (kDim + 8) + c]);
      rms_norm({want_q.data(), nullptr, want_q.data(), tokens * heads, kDim, kDim, kDim, 1e-6f, false}, machine.cpu);
      rms_norm({want_kv.data(), widen(weight).data(), want_kv.data(), tokens, kDim, kDim, kDim, 1e-6f, true},
               machine.cpu);
      std::vector<uint8_t> want_pages(static_cast<size_t>(4 * pages.page_stride), 0xa5);
      const KvRowLayout row_layout{format, kDim, kRope};
      for (int64_t t = 0; t < tokens; ++t) {
        const float* cos = &table[rope_rows[t] * kRope];
        for (int h = 0; h < heads; ++h)
          rope_rotate(&want_q[(t * heads + h) * kDim + kDim - kRope], cos, cos + kRope / 2, kRope / 2,
                      RopeDirection::kForward);
        float* row = &want_kv[t * kDim];
        rope_rotate(row + kDim - kRope, cos, cos + kRope / 2, kRope / 2, RopeDirection::kForward);
        for (int c = 0; c < kDim; ++c) row[c] = round_bf16(row[c]);
        if (slots[t] < 0 || slots[t] >= pages.num_rows) continue;
        std::vector<uint8_t> bytes(static_cast<size_t>(row_layout.row_bytes()));
        encode_kv_row(row_layout, row, bytes.data());
        place_row(want_pages, pages, format, slots[t], bytes);
      }

      DeviceArray<bf16> device_q(machine, q), q_out(machine, static_cast<int64_t>(q.size())), device_kv(machine, kv),
          device_weight(machine, weight);
      DeviceArray<int32_t> device_rope_rows(machine, rope_rows), device_slots(machine, slots);
      DeviceArray<uint8_t> device_pages(machine, std::vector<uint8_t>(want_pages.size(), 0xa5));
      pages.base = device_pages.data();
      rope_norm_insert(
          {device_q.data(), q_out.data(), device_kv.data(), kDim + 8, device_weight.data(), device_table.data(),
           device_rope_rows.data(), device_slots.data(), pages, format, tokens, heads, 1e-6f},
          machine.gpu);
      if (heads > 0) expect_same_bytes(q_out.host(), to_bf16(want_q), "queries");
      expect_same_bytes(device_pages.host(), want_pages, "pages");

      // And back: every stored row, a missing one, and one outside the cache.
      std::vector<int32_t> rows = {-1, 256};
      for (const int32_t slot : slots)
        if (slot >= 0 && slot < pages.num_rows) rows.push_back(slot);
      std::vector<bf16> want_rows(2 * kDim, bf16{0});
      for (size_t i = 2; i < rows.size(); ++i) {
        const PageLayout page_layout = kv_page_layout(format);
        DevicePages host = pages;
        host.base = want_pages.data();
        std::vector<uint8_t> bytes(static_cast<size_t>(page_layout.data_bytes + page_layout.scale_bytes));
        std::copy_n(host.data(rows[i], page_layout), page_layout.data_bytes, bytes.begin());
        std::copy_n(host.scales(rows[i], page_layout), page_layout.scale_bytes, bytes.begin() + page_layout.data_bytes);
        std::vector<float> values(kDim);
        decode_kv_row(row_layout, bytes.data(), values.data(), CpuIsa::kReference);
        for (const float value : values) want_rows.push_back(encode_bf16(value));
      }
      DeviceArray<int32_t> device_rows(machine, rows);
      DeviceArray<bf16> gathered(machine, static_cast<int64_t>(want_rows.size()));
      gather_kv_rows({pages, format, device_rows.data(), gathered.data(), static_cast<int64_t>(rows.size())},
                     machine.gpu);
      expect_same_bytes(gathered.host(), want_rows, "gathered rows");
    }
}

TEST(GpuRopeNormInsert, Binary32PagesAreRefused) {
  DSV4_NEEDS_GPU();
  Machine machine;
  DeviceArray<bf16> x(machine, kDim);
  EXPECT_THROW(rope_norm_insert({.kv = x.data(),
                                 .kv_stride = kDim,
                                 .pages = {nullptr, 4096, 1, 1},
                                 .format = KvFormat::kF32,
                                 .num_tokens = 1},
                                machine.gpu),
               Error);
}

}  // namespace
}  // namespace dsv4::test
