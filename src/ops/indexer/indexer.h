// indexer: scores of the compressed rows a CSA query may see, and the best index_topk of them. Spec 3.8.
//
//   score[t, j] = sum_h weight[t, h] * relu(q[t, h] . key[j])     binary32, j < (t + 1) / ratio
// Selected rows come out ascending, -1 after the last. Ties: the lower row wins. When everything visible fits, all of it is
// selected and nothing is scored.
//
// q and keys have taken the same round trip (index_round_trip): RoPE is applied before by the caller; with fp8 and fp4 keys
// both sides are rotated by the Hadamard matrix first, as the model was trained.
// Throws for fewer keys than the chunk may see, index_round_trip for keys of more than 4096 bytes; pointers are not checked.
#pragma once

#include <cstdint>

#include "ops/attention/kv_view.h"
#include "ops/cpu_context.h"

namespace dsv4 {

struct IndexerArgs {
  const float* q;            // [num_tokens, num_heads, dim], after index_round_trip
  const float* head_weight;  // [num_tokens, num_heads], scaled by dim^-0.5 * num_heads^-0.5
  PagedRowsView keys;
  IndexKeyLayout layout;
  int32_t* selected;  // [num_tokens, topk]
  float* margin;      // [num_tokens] score distance between the last chosen and the first refused; nullptr: not wanted
  int64_t first_position;
  int64_t num_tokens;
  int num_heads;
  int topk;
  int compress_ratio;
};

void indexer(const IndexerArgs& args, const CpuContext& context);

// x: [dim] in place: y = H x * dim^-0.5, natural (Sylvester) order; dim is a power of two.
void hadamard(float* x, int dim);

// x: [dim] in place, what storing and reading a key does to it: Hadamard (fp8, fp4 only), then the format's rounding.
void index_round_trip(const IndexKeyLayout& layout, float* x, CpuIsa isa);

}  // namespace dsv4
