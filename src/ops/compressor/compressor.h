// compressor: pools the projections of `ratio` tokens into one row per window, streaming. Spec 3.7.
//
// Per channel: softmax over the slots' gates, weighted sum of their values, binary32. Without overlap a window has `ratio`
// slots. With overlap (CSA) projections are twice as wide: channels [0, dim) of a token serve the NEXT window, channels
// [dim, 2 dim) its own, so a window has 2 * ratio slots; in the first window the earlier ones are absent (gate -inf).
// State rows: overlap: [0, ratio) previous window, [ratio, 2 ratio) current; else [0, ratio) current. Gates are stored with
// the position bias added. Initial state: values 0, gates -inf.
// Then: (round to bf16,) RMSNorm, (round,) RoPE at position window * ratio, (round): rounding outside exact mode.
// compress throws for a rope_dim above 1024 or above dim; pointers are not checked.
#pragma once

#include <cstdint>

#include "ops/cpu_context.h"
#include "ops/rope/rope.h"

namespace dsv4 {

struct CompressorShape {
  int ratio;
  bool overlap;
  int dim;  // channels of a finished row
  int rope_dim;

  int width() const { return overlap ? 2 * dim : dim; }  // of a token's projection
  int64_t state_rows() const { return overlap ? 2 * ratio : ratio; }
  int64_t state_elems() const { return state_rows() * width(); }  // of each of the two buffers
};

struct CompressorArgs {
  CompressorShape shape;
  const float* value;        // [num_tokens, width] wkv x
  const float* gate;         // [num_tokens, width] wgate x, without position bias
  const float* ape;          // [ratio, width] position bias
  const float* norm_weight;  // [dim]
  const RopeFreqs* rope;
  float* state_value;  // [state_rows, width] updated
  float* state_gate;   // [state_rows, width] updated
  float* rows;         // [number of completed windows, dim] finished rows, first one is window first_position / ratio
  int64_t first_position;
  int64_t num_tokens;
  float rms_eps;
  bool round_output;  // to bf16
};

// Windows completed by a chunk: rows that compress() writes.
int64_t num_completed_windows(int64_t first_position, int64_t num_tokens, int ratio);

void compress(const CompressorArgs& args, const CpuContext& context);

// Values 0, gates -inf.
void reset_compressor_state(const CompressorShape& shape, float* state_value, float* state_gate);

}  // namespace dsv4
