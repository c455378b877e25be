// Indexer on the CPU: keys of the chunk are decoded once, tokens are scored in parallel.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "ops/indexer/indexer.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

// Chooses the k best of scores[0, n), n > k. Returns the margin to the next one.
float choose_topk(const std::vector<float>& scores, int k, int32_t* out) {
  static thread_local std::vector<int32_t> order;
  order.resize(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); };
  std::nth_element(order.begin(), order.begin() + k, order.end(), before);  // order[k] is the first refused
  const int32_t last_chosen = *std::max_element(order.begin(), order.begin() + k, before);
  const float margin = scores[last_chosen] - scores[order[k]];
  std::copy_n(order.begin(), k, out);
  std::sort(out, out + k);
  return margin;
}

void select_all(int64_t visible, int topk, int32_t* out) {
  std::iota(out, out + visible, 0);
  std::fill(out + visible, out + topk, -1);
}

}  // namespace

void hadamard(float* x, int dim) {
  for (int half = 1; half < dim; half *= 2)
    for (int start = 0; start < dim; start += 2 * half)
      for (int i = start; i < start + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  const float factor = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int i = 0; i < dim; ++i) x[i] *= factor;
}

void index_round_trip(const IndexKeyLayout& layout, float* x, CpuIsa isa) {
  if (layout.format == IndexFormat::kFp8 || layout.format == IndexFormat::kFp4) hadamard(x, layout.dim);
  uint8_t row[4096];
  DSV4_CHECK(layout.row_bytes() <= static_cast<int64_t>(sizeof(row)), "index_head_dim = {}", layout.dim);
  encode_index_key(layout, x, row);
  decode_index_key(layout, row, x, isa);
}

void indexer(const IndexerArgs& args, const CpuContext& context) {
  if (args.num_tokens == 0) return;
  const VecKernels& vec = vec_kernels(context.isa);
  const int dim = args.layout.dim;
  const auto visible_at = [&](int64_t token) { return (args.first_position + token + 1) / args.compress_ratio; };
  const int64_t max_visible = visible_at(args.num_tokens - 1);
  DSV4_CHECK(args.keys.num_rows >= max_visible, "{} index keys, {} visible", args.keys.num_rows, max_visible);

  static thread_local std::vector<float> decoded;  // of the calling thread; workers only read
  if (max_visible > args.topk) {
    decoded.resize(static_cast<size_t>(max_visible * dim));
    float* keys = decoded.data();
    for_rows(context, max_visible, dim,
             [&](int64_t j) { decode_index_key(args.layout, args.keys.row(j), keys + j * dim, context.isa); });
  }
  const float* keys = decoded.data();
  for_rows(context, args.num_tokens, max_visible * (args.num_heads * dim + 16), [&](int64_t token) {
    const int64_t visible = visible_at(token);
    int32_t* selected = args.selected + token * args.topk;
    float margin = std::numeric_limits<float>::infinity();
    if (visible <= args.topk) {
      select_all(visible, args.topk, selected);
    } else {
      static thread_local std::vector<float> scores;
      scores.resize(static_cast<size_t>(visible));
      const float* q = args.q + token * args.num_heads * dim;
      const float* weight = args.head_weight + token * args.num_heads;
      vec.relu_scores(q, weight, args.num_heads, keys, visible, dim, scores.data());
      margin = choose_topk(scores, args.topk, selected);
    }
    if (args.margin != nullptr) args.margin[token] = margin;
  });
}

}  // namespace dsv4
