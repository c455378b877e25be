// The plain attention: one token, one head, one row at a time, in the order of the specification.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/attention/attention_impl.h"

namespace dsv4 {
namespace {

std::vector<const uint8_t*> rows_of_token(const AttentionArgs& args, int64_t token) {
  const int64_t position = args.first_position + token;
  std::vector<const uint8_t*> rows;
  for (int64_t p = std::max<int64_t>(0, position - args.window_len + 1); p <= position; ++p)
    rows.push_back(args.window.row(p));
  if (args.compress_ratio == 0) return rows;
  if (args.selected == nullptr) {
    for (int64_t j = 0; j < (position + 1) / args.compress_ratio; ++j) rows.push_back(args.compressed.row(j));
  } else {
    const int32_t* selected = args.selected + token * args.max_selected;
    for (int i = 0; i < args.max_selected && selected[i] >= 0; ++i) rows.push_back(args.compressed.row(selected[i]));
  }
  return rows;
}

}  // namespace

void attention_reference(const AttentionArgs& args, const CpuContext& context) {
  const int64_t dim = args.layout.head_dim;
  context.pool.parallel_for(args.num_tokens, [&](int64_t token) {
    const auto rows = rows_of_token(args, token);
    std::vector<float> decoded(rows.size() * static_cast<size_t>(dim));
    for (size_t r = 0; r < rows.size(); ++r) decode_kv_row(args.layout, rows[r], &decoded[r * dim], CpuIsa::kReference);
    for (int h = 0; h < args.num_heads; ++h) {
      const int64_t head = token * args.num_heads + h;
      const float* q = args.q + head * dim;
      std::vector<double> score(rows.size());
      double max = -INFINITY;
      for (size_t r = 0; r < rows.size(); ++r) {
        for (int64_t i = 0; i < dim; ++i) score[r] += static_cast<double>(q[i]) * decoded[r * dim + i];
        score[r] *= args.scale;
        max = std::max(max, score[r]);
      }
      double denominator = 0;
      for (double& s : score) denominator += s = std::exp(s - max);
      if (args.lse != nullptr) args.lse[head] = static_cast<float>(std::log(denominator) + max);
      // A sink far above every score makes exp overflow to infinity: the output is then exactly zero, as it should be.
      denominator += std::exp(args.sink_logit[h] - max);
      for (int64_t i = 0; i < dim; ++i) {
        double sum = 0;
        for (size_t r = 0; r < rows.size(); ++r) sum += score[r] * decoded[r * dim + i];
        args.out[head * dim + i] = static_cast<float>(sum / denominator);
      }
    }
  });
}

}  // namespace dsv4
