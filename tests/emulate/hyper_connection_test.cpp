// The source of hyper_connection_boundary, run on the CPU, against hc_post, hc_pre, hc_head and quantize_rows.
#include "ops/hyper_connection/hyper_connection_cuda.cu"  // NOLINT: the kernel itself

#include <gtest/gtest.h>

#include "ops/hyper_connection_case.h"

namespace dsv4::test {
namespace {

// 64-byte aligned, as device memory is.
template <class T>
struct Array {
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  int64_t count;
  std::unique_ptr<T, Free> memory;

  explicit Array(int64_t n)
      : count(n), memory(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64))) {
    std::memset(static_cast<void*>(memory.get()), 0xa5, static_cast<size_t>(n) * sizeof(T));
  }
  explicit Array(const std::vector<T>& values) : Array(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), memory.get());
  }
  T* data() const { return memory.get(); }
  std::vector<T> host() const { return {data(), data() + count}; }
};
using Site = HcSite<Array>;

// One tile, a partial one, many tiles a cluster (also more than it has CTAs), one and two teams of warps, both widths.
const std::pair<int64_t, int64_t> kShapes[] = {{3, 512}, {37, 1024}, {400, 512}, {8, 4096}, {11, 7168}};

TEST(EmulatedHyperConnection, BoundaryEqualsPostThenPreThenNorm) {
  ThreadPool pool;
  const CpuContext cpu{pool};
  for (const auto& [tokens, hidden] : kShapes) {
    SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden));
    const HcInputs in(tokens, hidden, 24);
    const Site site(in);
    hyper_connection_boundary(site.args(in, false), {});
    expect_post_then_pre_then_norm(in, site, cpu);
  }
}

TEST(EmulatedHyperConnection, HeadCollapseEqualsReference) {
  ThreadPool pool;
  const CpuContext cpu{pool};
  for (const auto& [tokens, hidden] : {std::pair<int64_t, int64_t>{11, 512}, {70, 1024}}) {
    const HcInputs in(tokens, hidden, 4);
    const Site site(in);
    HcBoundaryArgs args = site.args(in, true);
    args.norm_weight = nullptr;
    hyper_connection_boundary(args, {});
    expect_head_collapse(in, site, cpu);
  }
}

// Out of place, two clusters may share a tile; in place, one has it.
TEST(EmulatedHyperConnection, CallsInPlaceGiveTheBytesOfOthers) {
  for (const auto& [tokens, hidden] : {std::pair<int64_t, int64_t>{3, 512}, {8, 1024}, {5, 7168}})
    expect_same_bytes_in_place<Array>(HcInputs(tokens, hidden, 24),
                                      [](const HcBoundaryArgs& args) { hyper_connection_boundary(args, {}); });
}

TEST(EmulatedHyperConnection, NormAndQuantiserInsideGiveTheBytesOfQuantizeRows) {
  ThreadPool pool;
  const CpuContext cpu{pool};
  for (const auto& [tokens, hidden] : {std::pair<int64_t, int64_t>{3, 512}, {130, 512}, {5, 7168}})
    for (const RowFormat format : {RowFormat::kNvfp4, RowFormat::kFp8})
      for (const SfLayout layout : {SfLayout::kLinear, SfLayout::k128x4}) {
        if (format != RowFormat::kNvfp4 && layout != SfLayout::kLinear) continue;
        SCOPED_TRACE(std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden) + ", format " +
                     std::to_string(static_cast<int>(format)));
        const HcInputs in(tokens, hidden, 24);
        const Site fused(in), unfused(in);
        HcBoundaryArgs args = fused.args(in, false);
        args.out = fused.quantized(format, layout);
        hyper_connection_boundary(args, {});
        const Array<bf16> collapsed(tokens * hidden);
        args = unfused.args(in, false);
        args.norm_weight = nullptr;
        // Collapsed rows beside codes of no interest: the order of a sum may depend on the format.
        args.out = unfused.quantized(format, layout);
        args.out.y = collapsed.data();
        hyper_connection_boundary(args, {});
        quantize_rows(QuantizeArgs{collapsed.data(), false, unfused.weight.data(), kHcEps, tokens, hidden, hidden,
                                   unfused.quantized(format, layout)},
                      cpu);
        EXPECT_EQ(std::memcmp(fused.y.data(), unfused.y.data(), static_cast<size_t>(tokens * hidden) * 2), 0);
        EXPECT_EQ(std::memcmp(fused.codes.data(), unfused.codes.data(), static_cast<size_t>(fused.codes.count)), 0);
        EXPECT_EQ(std::memcmp(fused.sf.data(), unfused.sf.data(), static_cast<size_t>(fused.sf.count)), 0);
        if (format != RowFormat::kNvfp4) continue;
        EXPECT_EQ(std::memcmp(fused.row_global.data(), unfused.row_global.data(), static_cast<size_t>(tokens) * 4), 0);
      }
}

}  // namespace
}  // namespace dsv4::test
