// moe, reference: token by token, expert by expert, in the order of moe.h. The GEMMs are gemm's reference.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "ops/gemm/gemm_backends.h"
#include "ops/moe/moe_backends.h"
#include "ops/moe/swiglu.h"

namespace dsv4 {
namespace {

// y = w x for one row of activations, in the number format of the expert's GEMMs.
void expert_matvec(const float* x, const Weight& w, bool a4, bool round_output, float* y, const CpuContext& context) {
  gemm_reference({x, &w, y, 1, w.view.cols, w.view.rows, round_output, false, a4}, context);
}

struct Scratch {
  std::vector<float> gate, up, h, y;
};

void run_expert(const float* x, const ExpertWeights& expert, float rho, bool a4, const MoeArgs& args, Scratch& scratch,
                const CpuContext& context) {
  const bool exact = args.precision.exact;
  const int64_t inter = expert.w1.view.rows;
  scratch.gate.resize(inter);
  scratch.up.resize(inter);
  scratch.h.resize(inter);
  scratch.y.resize(args.hidden);
  expert_matvec(x, expert.w1, a4, !exact, scratch.gate.data(), context);
  expert_matvec(x, expert.w3, a4, !exact, scratch.up.data(), context);
  for (int64_t i = 0; i < inter; ++i) {
    const float h = swiglu(scratch.gate[i], scratch.up[i], rho, args.swiglu_limit);
    scratch.h[i] = exact || a4 ? h : round_bf16(h);
  }
  expert_matvec(scratch.h.data(), expert.w2, a4, !exact, scratch.y.data(), context);
}

}  // namespace

void moe_reference(const MoeArgs& args, const CpuContext& context) {
  const bool exact = args.precision.exact;
  const bool a4 = !exact && args.precision.act == ActFormat::kNvfp4;
  Scratch scratch;
  std::vector<float> sum(args.hidden);
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    const float* x = args.x + token * args.hidden;
    std::vector<std::pair<int32_t, float>> slots;
    for (int slot = 0; slot < args.num_topk; ++slot) {
      const int64_t idx = token * args.num_topk + slot;
      if (args.topk_idx[idx] >= 0) slots.emplace_back(args.topk_idx[idx], args.topk_weights[idx]);
    }
    std::stable_sort(slots.begin(), slots.end(), [](const auto& a, const auto& b) { return a.first < b.first; });

    std::fill(sum.begin(), sum.end(), 0.0f);
    for (const auto& [expert, rho] : slots) {
      run_expert(x, args.experts[expert], rho, a4, args, scratch, context);
      for (int64_t i = 0; i < args.hidden; ++i) sum[i] += scratch.y[i];
    }
    if (args.shared != nullptr) {
      run_expert(x, *args.shared, 1.0f, false, args, scratch, context);
      for (int64_t i = 0; i < args.hidden; ++i) sum[i] += scratch.y[i];
    }
    float* y = args.y + token * args.hidden;
    for (int64_t i = 0; i < args.hidden; ++i) y[i] = exact ? sum[i] : round_bf16(sum[i]);
  }
}

}  // namespace dsv4
