// moe: one layer of routed NVFP4 experts with an FP8 shared expert, uniform routing.
#include <fmt/format.h>

#include <algorithm>
#include <random>

#include "bench/bench.h"
#include "ops/gemm/gemm_pack.h"
#include "ops/moe/moe.h"

namespace dsv4::bench {
namespace {

struct Layer {
  std::vector<RandomWeight> storage;
  std::vector<ExpertWeights> experts;
  ExpertWeights shared;
};

ExpertWeights make_expert(Layer& layer, WeightFormat format, const ModelShape& shape) {
  ExpertWeights e;
  for (Weight* w : {&e.w1, &e.w3, &e.w2}) {
    const bool down = w == &e.w2;
    layer.storage.push_back(random_weight(format, down ? shape.hidden : shape.inter, down ? shape.inter : shape.hidden,
                                          layer.storage.size() + 1));
    *w = layer.storage.back().weight;
  }
  return e;
}

// Routing of one repetition: num_topk distinct experts per token.
std::vector<int32_t> random_routing(std::mt19937& rng, int64_t num_tokens, int num_topk, int num_experts) {
  std::vector<int32_t> ids(static_cast<size_t>(num_experts)), routing;
  for (int e = 0; e < num_experts; ++e) ids[static_cast<size_t>(e)] = e;
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int i = 0; i < num_topk; ++i) {
      std::swap(ids[static_cast<size_t>(i)],
                ids[static_cast<size_t>(i) + rng() % static_cast<uint32_t>(num_experts - i)]);
      routing.push_back(ids[static_cast<size_t>(i)]);
    }
  }
  return routing;
}

}  // namespace

void bench_moe(Bench& bench) {
  ModelShape shape = model_shape(bench.options().shape);
  const int64_t expert_bytes = 3 * shape.hidden * shape.inter * 9 / 16;
  // As many experts as the working set holds, packed and stored; the routing is uniform over them.
  const int64_t fitting = bench.options().working_set_bytes / expert_bytes;
  shape.num_experts = static_cast<int>(std::clamp<int64_t>(fitting, shape.num_topk, shape.num_experts));
  Layer layer;
  std::vector<Weight*> list;
  for (int e = 0; e < shape.num_experts; ++e) layer.experts.push_back(make_expert(layer, WeightFormat::kNvfp4, shape));
  layer.shared = make_expert(layer, WeightFormat::kFp8Block, shape);
  for (ExpertWeights& e : layer.experts) list.insert(list.end(), {&e.w1, &e.w3, &e.w2});
  pack_weights(list, bench.context());

  for (const ActFormat act : {ActFormat::kBf16, ActFormat::kNvfp4}) {
    const std::string name = fmt::format("{} {}x{} experts {} top {}", act == ActFormat::kBf16 ? "a16" : "a4",
                                         shape.hidden, shape.inter, shape.num_experts, shape.num_topk);
    if (!bench.wants(name)) continue;
    for (int64_t num_tokens : bench.options().rows) {
      std::mt19937 rng(1);
      constexpr int kRoutings = 16;
      std::vector<std::vector<int32_t>> routings;
      for (int i = 0; i < kRoutings; ++i)
        routings.push_back(random_routing(rng, num_tokens, shape.num_topk, shape.num_experts));
      const std::vector<float> weights(static_cast<size_t>(num_tokens * shape.num_topk), 0.25f);
      const std::vector<float> x = random_bf16_values(num_tokens * shape.hidden, 5);
      std::vector<float> y(x.size());
      MoeArgs args{};
      args.x = x.data();
      args.topk_weights = weights.data();
      args.y = y.data();
      args.experts = layer.experts.data();
      args.shared = &layer.shared;
      args.num_tokens = num_tokens;
      args.hidden = shape.hidden;
      args.inter = shape.inter;
      args.num_experts = shape.num_experts;
      args.num_topk = shape.num_topk;
      args.swiglu_limit = 10.0f;
      args.precision.act = act;
      OpCost cost;  // mean over the routings
      for (const auto& routing : routings) {
        args.topk_idx = routing.data();
        const OpCost one = moe_cost(args);
        cost.bytes += one.bytes / kRoutings;
        cost.flops += one.flops / kRoutings;
      }
      const Ceilings& c = bench.ceilings();
      const double peak = act == ActFormat::kNvfp4 ? c.a4_flops() : c.a16_flops();
      bench.measure("moe", name, num_tokens, cost, peak, [&](int64_t rep) {
        args.topk_idx = routings[static_cast<size_t>(rep % kRoutings)].data();
        moe(args, bench.context());
      });
    }
  }
}

}  // namespace dsv4::bench
