// gemm: argument checks, the table of implementations, the cost model.
#include "ops/gemm/gemm.h"

#include "base/check.h"
#include "ops/gemm/gemm_backends.h"
#include "ops/gemm/panel.h"

namespace dsv4 {
namespace {

using GemmFunction = void (*)(const GemmArgs&, const CpuContext&);

// Indexed by CpuIsa.
constexpr GemmFunction kGemmByIsa[] = {gemm_reference, gemm_simd, gemm_simd, gemm_simd};

void check_args(const GemmArgs& args) {
  DSV4_CHECK(args.w != nullptr, "gemm without a weight");
  const WeightView& w = args.w->view;
  DSV4_CHECK(args.num_tokens >= 0, "num_tokens = {}", args.num_tokens);
  DSV4_CHECK(w.rows >= 0 && w.cols >= 0, "weight [{}, {}]", w.rows, w.cols);
  DSV4_CHECK(args.x_stride >= w.cols, "x_stride = {} for {} columns", args.x_stride, w.cols);
  DSV4_CHECK(args.y_stride >= w.rows, "y_stride = {} for {} rows", args.y_stride, w.rows);
  DSV4_CHECK(!args.x_to_nvfp4 || w.format == WeightFormat::kNvfp4, "nvfp4 activations need an nvfp4 weight");
  if (args.num_tokens == 0 || w.rows == 0) return;
  DSV4_CHECK(args.y != nullptr && (args.x != nullptr || w.cols == 0), "null x or y");
  DSV4_CHECK(w.data != nullptr || w.cols == 0, "weight without data");
  if (w.format == WeightFormat::kNvfp4) {
    DSV4_CHECK(w.cols % kNvfp4GroupSize == 0, "nvfp4 weight with {} columns", w.cols);
    DSV4_CHECK(w.sf != nullptr || w.cols == 0, "nvfp4 weight without scale factors");
  }
  if (w.format == WeightFormat::kFp8Block)
    DSV4_CHECK(w.block_scales != nullptr || w.cols == 0, "fp8 block weight without block scales");
}

}  // namespace

const PanelKernels* panel_kernels(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kReference:
      return nullptr;
    case CpuIsa::kAvx2:
      return &panel_kernels_avx2();
    case CpuIsa::kAvx512:
      return &panel_kernels_avx512();
    case CpuIsa::kAmx:
      return &panel_kernels_amx();
  }
  return nullptr;
}

void gemm(const GemmArgs& args, const CpuContext& context) {
  check_args(args);
  DSV4_CHECK(context.isa <= best_cpu_isa(), "instruction set {} is not supported by this machine ({})",
             cpu_isa_name(context.isa), cpu_isa_name(best_cpu_isa()));
  if (args.num_tokens == 0 || args.w->view.rows == 0) return;
  kGemmByIsa[static_cast<int>(context.isa)](args, context);
}

OpCost gemm_cost(const WeightView& w, int64_t num_tokens) {
  const double activations = 4.0 * static_cast<double>(num_tokens) * static_cast<double>(w.rows + w.cols);
  return {static_cast<double>(w.stored_bytes()) + activations,
          2.0 * static_cast<double>(num_tokens) * static_cast<double>(w.rows) * static_cast<double>(w.cols)};
}

}  // namespace dsv4
