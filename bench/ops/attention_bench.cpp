// attention, indexer: one layer at 64K tokens of context, window + CSA top-k rows, for every cache row format.
#include <fmt/format.h>

#include <algorithm>

#include "bench/bench.h"
#include "cache/sequence_cache.h"
#include "ops/attention/attention.h"
#include "ops/indexer/indexer.h"

namespace dsv4::bench {
namespace {

constexpr int64_t kContext = 65536;
constexpr int kHeadDim = 512, kRopeDim = 64, kWindow = 128, kRatio = 4;

struct AttentionDims {
  int num_heads, index_heads, topk;
};
AttentionDims attention_dims(const std::string& shape) {
  if (shape == "pro") return {128, 64, 1024};
  if (shape == "demo") return {4, 8, 64};
  return {64, 64, 512};
}

constexpr const char* kKvNames[] = {"f32", "bf16", "fp8", "nvfp4"};
constexpr const char* kIndexNames[] = {"f32", "bf16", "fp8", "fp4"};

}  // namespace

void bench_attention(Bench& bench) {
  const AttentionDims dims = attention_dims(bench.options().shape);
  for (KvFormat format : {KvFormat::kBf16, KvFormat::kFp8, KvFormat::kNvfp4}) {
    const KvRowLayout layout{format, kHeadDim, kRopeDim};
    const std::string name = fmt::format("{} {} heads, {} + {} rows", kKvNames[static_cast<int>(format)],
                                         dims.num_heads, kWindow, dims.topk);
    if (!bench.wants(name)) continue;
    const int64_t num_compressed = kContext / kRatio;
    PagedRows rows(layout.row_bytes());
    std::vector<uint8_t> ring(static_cast<size_t>((kWindow + 512) * layout.row_bytes()));
    const auto values = random_bf16_values(kHeadDim * 64, 1);
    for (int64_t j = 0; j < num_compressed; ++j)
      encode_kv_row(layout, &values[static_cast<size_t>(j % 64 * kHeadDim)], rows.append());
    for (int64_t p = 0; p < kWindow + 512; ++p)
      encode_kv_row(layout, &values[static_cast<size_t>(p % 64 * kHeadDim)],
                    &ring[static_cast<size_t>(p * layout.row_bytes())]);
    for (int64_t num_tokens : bench.options().rows) {
      if (num_tokens > 512) continue;
      const auto q = random_bf16_values(num_tokens * dims.num_heads * kHeadDim, 2),
                 sink = random_bf16_values(dims.num_heads, 3);
      std::vector<float> out(q.size());
      std::vector<int32_t> selected;
      for (int64_t t = 0; t < num_tokens; ++t)
        for (int i = 0; i < dims.topk; ++i)
          selected.push_back(static_cast<int32_t>(i * ((num_compressed - 128) / dims.topk) + t % 8));
      const AttentionArgs args{.q = q.data(),
                               .out = out.data(),
                               .lse = nullptr,
                               .sink_logit = sink.data(),
                               .window = {ring.data(), kWindow + 512, layout.row_bytes()},
                               .compressed = rows.view(),
                               .layout = layout,
                               .selected = selected.data(),
                               .max_selected = dims.topk,
                               .first_position = kContext - num_tokens,
                               .num_tokens = num_tokens,
                               .num_heads = dims.num_heads,
                               .window_len = kWindow,
                               .compress_ratio = kRatio,
                               .scale = 0.0441941738f};
      const double attended = static_cast<double>(kWindow + dims.topk);
      const OpCost cost{static_cast<double>(num_tokens) *
                            (attended * static_cast<double>(layout.row_bytes()) + 8.0 * dims.num_heads * kHeadDim),
                        static_cast<double>(num_tokens) * attended * dims.num_heads * 4.0 * kHeadDim};
      bench.measure("attention", name, num_tokens, cost, bench.ceilings().f32_flops,
                    [&](int64_t) { attention(args, bench.context()); });
    }
  }
}

void bench_indexer(Bench& bench) {
  const AttentionDims dims = attention_dims(bench.options().shape);
  constexpr int kDim = 128;
  for (IndexFormat format : {IndexFormat::kBf16, IndexFormat::kFp8, IndexFormat::kFp4}) {
    const IndexKeyLayout layout{format, kDim};
    const int64_t num_keys = kContext / kRatio;
    const std::string name = fmt::format("{} {} heads, {} keys, top {}", kIndexNames[static_cast<int>(format)],
                                         dims.index_heads, num_keys, dims.topk);
    if (!bench.wants(name)) continue;
    PagedRows keys(layout.row_bytes());
    const auto values = random_bf16_values(kDim * 1024, 1);
    for (int64_t j = 0; j < num_keys; ++j)
      encode_index_key(layout, &values[static_cast<size_t>(j % 1024 * kDim)], keys.append());
    for (int64_t num_tokens : bench.options().rows) {
      if (num_tokens > 32) continue;
      const auto q = random_bf16_values(num_tokens * dims.index_heads * kDim, 2),
                 weight = random_bf16_values(num_tokens * dims.index_heads, 3);
      std::vector<int32_t> selected(static_cast<size_t>(num_tokens * dims.topk));
      const IndexerArgs args{.q = q.data(),
                             .head_weight = weight.data(),
                             .keys = keys.view(),
                             .layout = layout,
                             .selected = selected.data(),
                             .margin = nullptr,
                             .first_position = kContext - num_tokens,
                             .num_tokens = num_tokens,
                             .num_heads = dims.index_heads,
                             .topk = dims.topk,
                             .compress_ratio = kRatio};
      const OpCost cost{static_cast<double>(num_keys * layout.row_bytes()),
                        2.0 * static_cast<double>(num_tokens * num_keys) * dims.index_heads * kDim};
      bench.measure("indexer", name, num_tokens, cost, bench.ceilings().f32_flops,
                    [&](int64_t) { indexer(args, bench.context()); });
    }
  }
}

}  // namespace dsv4::bench
