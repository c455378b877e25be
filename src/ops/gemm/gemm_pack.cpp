// Packing: memory area with huge pages, panels filled in parallel.
#include "ops/gemm/gemm_pack.h"

#include <emmintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/math.h"
#include "ops/gemm/packed_weight.h"
#include "ops/gemm/panel.h"

namespace dsv4 {
namespace {

constexpr int64_t kHugePageBytes = 2 << 20;

// Spreads the pages of an area over all memory nodes in turn. Which thread reads a panel changes from loop to loop, so no node
// is right for it; what can be had is that all of them share the load. Nothing on a machine with one node.
void interleave_nodes(void* area, int64_t bytes) {
#if defined(__linux__) && defined(SYS_mbind)
  unsigned long nodes = 0;
  for (int node = 0; node < 64; ++node) {
    std::error_code error;
    if (std::filesystem::exists("/sys/devices/system/node/node" + std::to_string(node), error)) nodes |= 1ul << node;
  }
  constexpr int kInterleave = 3;  // MPOL_INTERLEAVE; a refusal only costs speed
  if (std::popcount(nodes) > 1)
    ::syscall(SYS_mbind, area, static_cast<unsigned long>(bytes), kInterleave, &nodes, 65ul, 0u);
#endif
}

// Uninitialised memory for packed panels, shared by all weights of one pack_weights call.
std::shared_ptr<std::byte> allocate_area(int64_t bytes) {
  const int64_t alignment = bytes >= kHugePageBytes ? kHugePageBytes : 64;
  void* area = std::aligned_alloc(alignment, round_up(std::max<int64_t>(bytes, 1), alignment));
  if (area == nullptr) throw_resource("cannot allocate {} bytes for packed weights", bytes);
  if (bytes >= kHugePageBytes) {
    ::madvise(area, bytes, MADV_HUGEPAGE);  // a refusal only costs speed
    interleave_nodes(area, round_up(bytes, alignment));
  }
  return {static_cast<std::byte*>(area), [](std::byte* pointer) { std::free(pointer); }};
}

__m128i load16(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
__m128i load4(const std::byte* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm_cvtsi32_si128(word);
}
void store16(std::byte* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

// 16 rows x 8 words -> 8 x [16 rows], as 4 x 4 blocks. The same columns of the next panel are prefetched: its rows lie
// row_bytes apart, which no hardware stream follows.
void transpose_codes(const std::byte* src, int64_t row_bytes, std::byte* dst) {
  for (int quad = 0; quad < 4; ++quad) {
    const std::byte* row = src + quad * 4 * row_bytes;
    for (int r = 0; r < 4; ++r) _mm_prefetch(reinterpret_cast<const char*>(row + (r + 16) * row_bytes), _MM_HINT_T1);
    for (int half = 0; half < 2; ++half, row += 16) {
      const __m128i a = load16(row), b = load16(row + row_bytes), c = load16(row + 2 * row_bytes),
                    d = load16(row + 3 * row_bytes);
      const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
      const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
      std::byte* to = dst + half * 256 + quad * 16;
      store16(to, _mm_unpacklo_epi64(ab_low, cd_low));
      store16(to + 64, _mm_unpackhi_epi64(ab_low, cd_low));
      store16(to + 128, _mm_unpacklo_epi64(ab_high, cd_high));
      store16(to + 192, _mm_unpackhi_epi64(ab_high, cd_high));
    }
  }
}

// 16 rows x 4 bytes -> 4 x [16 rows]. Interleaving the first half of the 64 bytes with the second rotates the bits of each
// byte's index by one; four times brings row-major (rrrrcc) to column-major (ccrrrr).
void transpose_sf(const std::byte* src, int64_t row_bytes, std::byte* dst) {
  __m128i v[4];
  for (int quad = 0; quad < 4; ++quad) {
    const std::byte* row = src + quad * 4 * row_bytes;
    v[quad] = _mm_unpacklo_epi64(_mm_unpacklo_epi32(load4(row), load4(row + row_bytes)),
                                 _mm_unpacklo_epi32(load4(row + 2 * row_bytes), load4(row + 3 * row_bytes)));
  }
  for (int round = 0; round < 4; ++round) {
    const __m128i a = _mm_unpacklo_epi8(v[0], v[2]), b = _mm_unpackhi_epi8(v[0], v[2]);
    const __m128i c = _mm_unpacklo_epi8(v[1], v[3]), d = _mm_unpackhi_epi8(v[1], v[3]);
    v[0] = a, v[1] = b, v[2] = c, v[3] = d;
  }
  for (int g = 0; g < 4; ++g) store16(dst + g * 16, v[g]);
}

struct PanelJob {
  const WeightView* w;
  int64_t row_begin;
  std::byte* dst;
};

}  // namespace

bool packing_pays(const WeightView& w, CpuIsa isa) {
  return isa != CpuIsa::kReference && w.format == WeightFormat::kNvfp4 && w.rows > 0 && w.cols > 0;
}

int64_t packed_bytes(const WeightView& w) { return ceil_div(w.rows, kPanelRows) * packed_panel_bytes(w.cols); }

void pack_panel(const WeightView& w, int64_t row_begin, std::byte* dst) {
  const int64_t num_rows = std::min<int64_t>(kPanelRows, w.rows - row_begin);
  const int64_t num_groups = w.cols / kNvfp4GroupSize;
  const std::byte* codes = static_cast<const std::byte*>(w.data) + row_begin * (w.cols / 2);
  const std::byte* sf = reinterpret_cast<const std::byte*>(w.sf) + row_begin * num_groups;
  const int64_t full_records = num_rows == kPanelRows ? w.cols / kPanelRecordCols : 0;
  for (int64_t rec = 0; rec < full_records; ++rec) {
    std::byte* record = dst + rec * kPanelRecordBytes;
    transpose_codes(codes + rec * 32, w.cols / 2, record);
    transpose_sf(sf + rec * 4, num_groups, record + 512);
  }
  if (full_records * kPanelRecordCols == w.cols) return;
  std::memset(dst + full_records * kPanelRecordBytes, 0, packed_panel_bytes(w.cols) - full_records * kPanelRecordBytes);
  for (int64_t group = full_records * 4; group < num_groups; ++group) {
    std::byte* record = dst + group / 4 * kPanelRecordBytes;
    for (int64_t r = 0; r < num_rows; ++r) {
      std::memcpy(record + (group % 4) * 128 + r * 4, codes + r * (w.cols / 2) + group * 8, 4);
      std::memcpy(record + (group % 4) * 128 + 64 + r * 4, codes + r * (w.cols / 2) + group * 8 + 4, 4);
      record[512 + (group % 4) * 16 + r] = sf[r * num_groups + group];
    }
  }
}

void pack_weights(std::span<Weight* const> weights, const CpuContext& context,
                  const std::function<void(int64_t, int64_t)>& progress) {
  int64_t total = 0;
  for (const Weight* weight : weights)
    if (packing_pays(weight->view, context.isa)) total += packed_bytes(weight->view);
  if (total == 0) return;

  const std::shared_ptr<std::byte> area = allocate_area(total);
  std::vector<PanelJob> jobs;
  int64_t offset = 0;
  for (Weight* weight : weights) {
    if (!packing_pays(weight->view, context.isa)) continue;
    DSV4_CHECK(weight->view.cols % kNvfp4GroupSize == 0 && weight->view.data != nullptr && weight->view.sf != nullptr,
               "packing an nvfp4 weight [{}, {}]", weight->view.rows, weight->view.cols);
    std::byte* data = area.get() + offset;
    weight->packed = std::make_shared<PackedWeight>(PackedWeight{area, data, packed_panel_bytes(weight->view.cols)});
    for (int64_t row = 0; row < weight->view.rows; row += kPanelRows, data += packed_panel_bytes(weight->view.cols))
      jobs.push_back({&weight->view, row, data});
    offset += packed_bytes(weight->view);
  }

  const int64_t step =
      std::max<int64_t>(1, progress ? static_cast<int64_t>(jobs.size()) / 100 : static_cast<int64_t>(jobs.size()));
  int64_t done = 0;
  for (int64_t begin = 0; begin < static_cast<int64_t>(jobs.size()); begin += step) {
    const int64_t end = std::min<int64_t>(begin + step, static_cast<int64_t>(jobs.size()));
    context.pool.parallel_for(end - begin, [&](int64_t i) {
      const PanelJob& job = jobs[static_cast<size_t>(begin + i)];
      pack_panel(*job.w, job.row_begin, job.dst);
    });
    for (int64_t i = begin; i < end; ++i) done += packed_panel_bytes(jobs[static_cast<size_t>(i)].w->cols);
    if (progress) progress(done, total);
  }
}

}  // namespace dsv4
