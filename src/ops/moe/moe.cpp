// moe: argument checks, the table of implementations, the cost model.
#include "ops/moe/moe.h"

#include "base/check.h"
#include "ops/moe/moe_backends.h"

namespace dsv4 {
namespace {

using MoeFunction = void (*)(const MoeArgs&, const CpuContext&);

// Indexed by CpuIsa.
constexpr MoeFunction kMoeByIsa[] = {moe_reference, moe_simd, moe_simd, moe_simd};

void check_matrix(const Weight& w, int64_t rows, int64_t cols, const char* name, int expert) {
  const WeightView& v = w.view;
  DSV4_CHECK(v.rows == rows && v.cols == cols, "expert {}: {} is [{}, {}], expected [{}, {}]", expert, name, v.rows,
             v.cols, rows, cols);
  DSV4_CHECK(v.data != nullptr, "expert {}: {} has no data", expert, name);
  DSV4_CHECK(v.format != WeightFormat::kNvfp4 || (v.sf != nullptr && v.cols % kNvfp4GroupSize == 0),
             "expert {}: {} is nvfp4 with {} columns and {} scale factors", expert, name, v.cols,
             v.sf == nullptr ? "without" : "with");
  DSV4_CHECK(v.format != WeightFormat::kFp8Block || v.block_scales != nullptr, "expert {}: {} is fp8 without scales",
             expert, name);
}

void check_expert(const ExpertWeights& e, int64_t hidden, int64_t inter, int expert) {
  check_matrix(e.w1, inter, hidden, "w1", expert);
  check_matrix(e.w3, inter, hidden, "w3", expert);
  check_matrix(e.w2, hidden, inter, "w2", expert);
}

void check_args(const MoeArgs& args) {
  DSV4_CHECK(args.num_tokens >= 0 && args.hidden > 0 && args.inter > 0, "moe: {} tokens, hidden {}, inter {}",
             args.num_tokens, args.hidden, args.inter);
  DSV4_CHECK(args.num_experts >= 0 && args.num_topk >= 0, "moe: {} experts, top {}", args.num_experts, args.num_topk);
  DSV4_CHECK(args.swiglu_limit > 0.0f, "swiglu_limit = {}", args.swiglu_limit);
  if (args.num_tokens == 0) return;
  DSV4_CHECK(args.x != nullptr && args.y != nullptr, "moe: null x or y");
  DSV4_CHECK(args.num_topk == 0 || (args.topk_idx != nullptr && args.topk_weights != nullptr), "moe: null routing");
  DSV4_CHECK(args.experts != nullptr || args.num_experts == 0, "moe: null experts");

  std::vector<bool> checked(static_cast<size_t>(args.num_experts));
  const bool a4 = !args.precision.exact && args.precision.act == ActFormat::kNvfp4;
  for (int64_t slot = 0; slot < args.num_tokens * args.num_topk; ++slot) {
    const int expert = args.topk_idx[slot];
    DSV4_CHECK(expert >= -1 && expert < args.num_experts, "slot {}: expert {} of {}", slot, expert, args.num_experts);
    if (expert < 0 || checked[static_cast<size_t>(expert)]) continue;
    checked[static_cast<size_t>(expert)] = true;
    const ExpertWeights& e = args.experts[expert];
    check_expert(e, args.hidden, args.inter, expert);
    DSV4_CHECK(!a4 || (e.w1.view.format == WeightFormat::kNvfp4 && e.w3.view.format == WeightFormat::kNvfp4 &&
                       e.w2.view.format == WeightFormat::kNvfp4),
               "expert {}: nvfp4 activations need nvfp4 weights", expert);
  }
  if (args.shared != nullptr) check_expert(*args.shared, args.hidden, args.shared->w1.view.rows, -1);
}

double expert_bytes(const ExpertWeights& e) {
  return static_cast<double>(e.w1.view.stored_bytes() + e.w3.view.stored_bytes() + e.w2.view.stored_bytes());
}

double expert_flops_per_token(const ExpertWeights& e) {
  return 2.0 * static_cast<double>(e.w1.view.rows * e.w1.view.cols + e.w3.view.rows * e.w3.view.cols +
                                   e.w2.view.rows * e.w2.view.cols);
}

}  // namespace

void moe(const MoeArgs& args, const CpuContext& context) {
  check_args(args);
  DSV4_CHECK(context.isa <= best_cpu_isa(), "instruction set {} is not supported by this machine ({})",
             cpu_isa_name(context.isa), cpu_isa_name(best_cpu_isa()));
  if (args.num_tokens == 0) return;
  kMoeByIsa[static_cast<int>(context.isa)](args, context);
}

OpCost moe_cost(const MoeArgs& args) {
  OpCost cost;
  std::vector<bool> counted(static_cast<size_t>(args.num_experts));
  for (int64_t slot = 0; slot < args.num_tokens * args.num_topk; ++slot) {
    const int expert = args.topk_idx[slot];
    if (expert < 0) continue;
    cost.flops += expert_flops_per_token(args.experts[expert]);
    if (!counted[static_cast<size_t>(expert)]) cost.bytes += expert_bytes(args.experts[expert]);
    counted[static_cast<size_t>(expert)] = true;
  }
  if (args.shared != nullptr && args.num_tokens > 0) {
    cost.bytes += expert_bytes(*args.shared);
    cost.flops += expert_flops_per_token(*args.shared) * static_cast<double>(args.num_tokens);
  }
  cost.bytes += 8.0 * static_cast<double>(args.num_tokens * args.hidden);  // x in, y out
  return cost;
}

}  // namespace dsv4
