// Vectorised attention: rows of the chunk are decoded to binary32 once, then tiles of heads run over row pointers.
//
// Work per task is one token and a group of heads; the order of rows and the fold of lanes are fixed, so the result does not
// depend on threads or on how the prompt was cut into chunks.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/attention/attention_impl.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

// More visible rows than this are not decoded as a whole (512 MiB at head_dim 512); each task decodes what it selected.
constexpr int64_t kMaxSharedRows = 1 << 18;

// Decoded rows of one chunk, or pointers straight into binary32 storage.
class DecodedRows {
 public:
  DecodedRows(const AttentionArgs& args, const CpuContext& context) : args_(args), dim_(args.layout.head_dim) {
    const int64_t last = args.first_position + args.num_tokens - 1;
    window_first_ = std::max<int64_t>(0, args.first_position - args.window_len + 1);
    if (args.layout.format == KvFormat::kF32) return;
    const int64_t num_window = last - window_first_ + 1;
    const int64_t visible = args.compress_ratio == 0 ? 0 : (last + 1) / args.compress_ratio;
    const bool sparse = args.selected != nullptr && args.num_tokens * args.max_selected < visible;
    shares_compressed_ = !sparse && visible <= kMaxSharedRows;
    const int64_t num_shared = shares_compressed_ ? visible : 0;
    static thread_local std::vector<float> buffer;  // of the calling thread; workers only read
    buffer.resize(static_cast<size_t>((num_window + num_shared) * dim_));
    window_ = buffer.data();
    compressed_ = window_ + num_window * dim_;
    for_rows(context, num_window + num_shared, 2 * dim_, [&](int64_t r) {
      const uint8_t* row = r < num_window ? args.window.row(window_first_ + r) : args.compressed.row(r - num_window);
      decode_kv_row(args.layout, row, window_ + r * dim_, context.isa);
    });
  }

  const float* window(int64_t position) const {
    if (window_ == nullptr) return reinterpret_cast<const float*>(args_.window.row(position));
    return window_ + (position - window_first_) * dim_;
  }

  // scratch: grows by one row for each row that is not shared
  const float* compressed(int64_t index, float* scratch, CpuIsa isa) const {
    if (window_ == nullptr) return reinterpret_cast<const float*>(args_.compressed.row(index));
    if (shares_compressed_) return compressed_ + index * dim_;
    decode_kv_row(args_.layout, args_.compressed.row(index), scratch, isa);
    return scratch;
  }
  bool needs_scratch() const { return window_ != nullptr && !shares_compressed_; }

 private:
  const AttentionArgs& args_;
  int64_t dim_;
  int64_t window_first_ = 0;
  float* window_ = nullptr;
  float* compressed_ = nullptr;
  bool shares_compressed_ = false;
};

struct Scratch {
  std::vector<const float*> rows;
  std::vector<float> scores;
  std::vector<float> decoded;
};

void collect_rows(const AttentionArgs& args, const DecodedRows& decoded, int64_t token, CpuIsa isa, Scratch& scratch) {
  const int64_t position = args.first_position + token, dim = args.layout.head_dim;
  scratch.rows.clear();
  for (int64_t p = std::max<int64_t>(0, position - args.window_len + 1); p <= position; ++p)
    scratch.rows.push_back(decoded.window(p));
  if (args.compress_ratio == 0) return;
  const int64_t visible = (position + 1) / args.compress_ratio;
  const int32_t* selected = args.selected == nullptr ? nullptr : args.selected + token * args.max_selected;
  int64_t count = visible;
  if (selected != nullptr)
    for (count = 0; count < args.max_selected && selected[count] >= 0;) ++count;
  if (decoded.needs_scratch()) scratch.decoded.resize(static_cast<size_t>(count * dim));
  for (int64_t i = 0; i < count; ++i)
    scratch.rows.push_back(
        decoded.compressed(selected == nullptr ? i : selected[i], scratch.decoded.data() + i * dim, isa));
}

// Heads per task: four share each row load; fewer when that would leave threads idle.
int heads_per_task(const AttentionArgs& args, int num_threads) {
  for (int group : {4, 2})
    if (args.num_heads % group == 0 && args.num_tokens * (args.num_heads / group) >= num_threads) return group;
  return args.num_tokens >= num_threads ? args.num_heads : 1;
}

}  // namespace

void attention_simd(const AttentionArgs& args, const CpuContext& context) {
  const VecKernels& vec = vec_kernels(context.isa);
  const int64_t dim = args.layout.head_dim;
  const DecodedRows decoded(args, context);
  const int group = heads_per_task(args, context.pool.num_threads());
  const int64_t groups_per_token = (args.num_heads + group - 1) / group;
  context.pool.parallel_for(args.num_tokens * groups_per_token, [&](int64_t task) {
    static thread_local Scratch scratch;
    const int64_t token = task / groups_per_token;
    const int first_head = static_cast<int>(task % groups_per_token) * group;
    const int num_heads = std::min(group, args.num_heads - first_head);
    collect_rows(args, decoded, token, context.isa, scratch);
    const int64_t num_rows = static_cast<int64_t>(scratch.rows.size());
    scratch.scores.resize(static_cast<size_t>(num_heads * num_rows));
    const int64_t head = token * args.num_heads + first_head;
    vec.attend_scores(args.q + head * dim, num_heads, dim, scratch.rows.data(), num_rows, args.scale,
                      scratch.scores.data(), num_rows);
    for (int h = 0; h < num_heads; ++h) {
      float* scores = scratch.scores.data() + h * num_rows;
      const float max = *std::max_element(scores, scores + num_rows);
      const float sum = vec.exp_sum(scores, num_rows, max);
      if (args.lse != nullptr) args.lse[head + h] = std::log(sum) + max;
      vec.scale(scores, nullptr, 1.0f / (sum + std::exp(args.sink_logit[first_head + h] - max)), num_rows, scores);
    }
    vec.attend_values(scratch.scores.data(), num_rows, num_heads, dim, scratch.rows.data(), num_rows,
                      args.out + head * dim);
  });
}

}  // namespace dsv4
