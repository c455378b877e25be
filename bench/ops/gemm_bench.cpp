// gemm: the expert matrices in NVFP4 (packed and as stored; a16, a4) and dense matrices in BF16 and FP8.
#include <fmt/format.h>

#include <algorithm>

#include "bench/bench.h"
#include "ops/gemm/gemm_pack.h"

namespace dsv4::bench {
namespace {

struct Case {
  const char* name;
  WeightFormat format;
  bool packed, x_is_bf16, a4;
  double (Ceilings::*peak)() const;
};

constexpr Case kCases[] = {
    {"nvfp4-a16", WeightFormat::kNvfp4, true, true, false, &Ceilings::a16_flops},
    {"nvfp4-a4", WeightFormat::kNvfp4, true, true, true, &Ceilings::a4_flops},
    {"nvfp4-a16-stored", WeightFormat::kNvfp4, false, true, false, &Ceilings::a16_flops},
    {"fp8", WeightFormat::kFp8Block, false, true, false, &Ceilings::a16_flops},
    {"bf16", WeightFormat::kBf16, false, true, false, &Ceilings::a16_flops},
};

void run_case(Bench& bench, const Case& c, int64_t rows, int64_t cols) {
  const std::string name = fmt::format("{} {}x{}", c.name, rows, cols);
  if (!bench.wants(name)) return;
  // Copies of the matrix, so that each call finds its weights in memory and not in cache (demo shapes stay in cache: there
  // the model's own weights do, too).
  const int64_t one = (WeightView{.format = c.format, .rows = rows, .cols = cols}).stored_bytes();
  const bool rotate = bench.options().shape != "demo";
  const int64_t copies = rotate ? std::max<int64_t>(1, bench.options().working_set_bytes / one) : 1;
  std::vector<RandomWeight> weights;
  std::vector<Weight*> list;
  for (int64_t i = 0; i < copies; ++i)
    weights.push_back(random_weight(c.format, rows, cols, static_cast<uint64_t>(i) + 1));
  if (c.packed && c.format == WeightFormat::kNvfp4) {
    for (RandomWeight& w : weights) list.push_back(&w.weight);
    pack_weights(list, bench.context());
  }
  const int64_t max_rows = *std::max_element(bench.options().rows.begin(), bench.options().rows.end());
  const std::vector<float> x = random_bf16_values(max_rows * cols, 99);
  std::vector<float> y(static_cast<size_t>(max_rows * rows));
  for (int64_t num_tokens : bench.options().rows) {
    const double peak = (bench.ceilings().*c.peak)();
    bench.measure("gemm", name, num_tokens, gemm_cost(weights[0].weight.view, num_tokens), peak, [&](int64_t rep) {
      gemm({x.data(), &weights[static_cast<size_t>(rep % copies)].weight, y.data(), num_tokens, cols, rows, true,
            c.x_is_bf16, c.a4},
           bench.context());
    });
  }
}

}  // namespace

void bench_gemm(Bench& bench) {
  const ModelShape shape = model_shape(bench.options().shape);
  for (const Case& c : kCases) {
    run_case(bench, c, shape.inter, shape.hidden);
    run_case(bench, c, shape.hidden, shape.inter);
  }
}

}  // namespace dsv4::bench
