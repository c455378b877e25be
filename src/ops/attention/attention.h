// attention: every query token of one sequence over its sliding window and the compressed rows it may see. Spec 3.5.
//
// One kv row serves all heads, as key and as value. For the query at position t:
//   window rows of positions max(0, t - window_len + 1) .. t, which must all be in the window (capacity covers the chunk);
//   compressed rows j < (t + 1) / ratio: all of them, or those listed in selected (CSA).
// One softmax over the union, binary32: s_j = scale * q.k_j; weights exp(s_j - M); the sink logit joins the denominator only.
// out is not rounded here (inverse RoPE follows). lse = natural log of the denominator without the sink; -inf never occurs,
// because a token sees itself.
// Throws for a window of too little capacity for the chunk and for fewer compressed rows than it may see; pointers and the ids in
// selected are not checked.
#pragma once

#include <cstdint>

#include "ops/attention/kv_view.h"
#include "ops/cpu_context.h"

namespace dsv4 {

struct AttentionArgs {
  const float* q;            // [num_tokens, num_heads, head_dim]
  float* out;                // [num_tokens, num_heads, head_dim]
  float* lse;                // [num_tokens, num_heads], nullptr: not wanted
  const float* sink_logit;   // [num_heads]
  WindowView window;         // holds the chunk's own rows too
  PagedRowsView compressed;  // num_rows = rows present; unused when compress_ratio == 0
  KvRowLayout layout;        // of both
  const int32_t*
      selected;  // [num_tokens, max_selected] compressed rows, ascending, -1 after the last; nullptr: all visible
  int max_selected;
  int64_t first_position;  // of the chunk; tokens have consecutive positions
  int64_t num_tokens;
  int num_heads;
  int window_len;
  int compress_ratio;  // 0: window only
  float scale;
};

void attention(const AttentionArgs& args, const CpuContext& context);

}  // namespace dsv4
