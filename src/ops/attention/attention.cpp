// Argument checks and choice of implementation.
#include "ops/attention/attention.h"

#include <algorithm>

#include "base/check.h"
#include "ops/attention/attention_impl.h"

namespace dsv4 {

void attention(const AttentionArgs& args, const CpuContext& context) {
  if (args.num_tokens == 0) return;
  DSV4_CHECK(args.window.capacity >=
                 std::min<int64_t>(args.first_position + args.num_tokens, args.window_len + args.num_tokens - 1),
             "window capacity {} for window_len {} and a chunk of {}", args.window.capacity, args.window_len,
             args.num_tokens);
  DSV4_CHECK(args.compress_ratio == 0 ||
                 args.compressed.num_rows >= (args.first_position + args.num_tokens) / args.compress_ratio,
             "{} compressed rows at position {}", args.compressed.num_rows, args.first_position + args.num_tokens);
  if (context.isa == CpuIsa::kReference) return attention_reference(args, context);
  attention_simd(args, context);
}

}  // namespace dsv4
