// compress_quantize: the compressor of spec 3.7 from fp32 projections to finished cache rows in pages. Contract of every backend; the CPU
// form (compress_quantize_cpu.cpp) is the reference. Same numbers as compressor.h with round_output, then the row or key format; the GPU sums
// its softmax in another order, so its pooled values may round the other way (a bf16 step), and rows with them.
//
// State: rings instead of the shifted buffers of compressor.h. The slot of position p is row p mod state_rows, so the
// "previous window" of an overlapping compressor needs no copy: the 2 * ratio rows hold exactly the last two windows. Gates are stored
// with the position bias added. Initial state: values 0, gates -inf.
//
// Three forms exist: main CSA (ratio 4, overlap, 512 channels), main HCA (ratio 128, 512 channels), indexer (ratio 4, overlap, 128 channels,
// Hadamard rotation before fp8 and fp4 keys).
#pragma once

#include "codec/bf16.h"
#include "ops/cpu_context.h"
#include "ops/quantize/kv_pages.h"

namespace dsv4 {

enum class CompressorKind : uint8_t { kCsa, kHca, kIndexer };

struct CompressorTraits {
  int ratio, dim, width, state_rows;
};
constexpr CompressorTraits compressor_traits(CompressorKind kind) {
  return kind == CompressorKind::kCsa   ? CompressorTraits{4, 512, 1024, 8}
         : kind == CompressorKind::kHca ? CompressorTraits{128, 512, 512, 128}
                                        : CompressorTraits{4, 128, 256, 8};
}

struct CompressCommon {
  CompressorKind kind;
  const float* value;       // [num_tokens, width] wkv x
  const float* gate;        // [num_tokens, width] wgate x, without position bias
  const float* ape;         // [ratio, width] position bias
  const bf16* norm_weight;  // [dim]
  const float* cos_sin;     // [num_positions, 64]: 32 cosines, then 32 sines
  float* state_value;       // [num_states, state_rows, width]
  float* state_gate;        // [num_states, state_rows, width]
  float rms_eps;
  DevicePages pages;         // where rows (kCsa, kHca) or keys (kIndexer) go
  KvFormat kv_format;        // kCsa, kHca
  IndexFormat index_format;  // kIndexer
};

// One token of each of num_tokens sequences: stores it in the state; if it completes a window, writes the row.
struct CompressDecodeArgs {
  CompressCommon common;
  const int32_t* positions;  // [num_tokens]
  const int32_t* states;     // [num_tokens] which state; no two tokens share one
  const int32_t* rope_rows;  // [num_tokens] row of cos_sin for position window * ratio; unused if no window completes
  const int32_t* slots;      // [num_tokens] cache row, no two alike; outside [0, pages.num_rows): not stored
  int64_t num_tokens;
};

// A chunk of one sequence: every window it completes, in parallel; then the state is brought up to date.
struct CompressPrefillArgs {
  CompressCommon common;  // state_*: this sequence's
  int64_t first_position;
  int64_t num_tokens;
  const int32_t* rope_rows;  // [number of completed windows]
  const int32_t* slots;      // [number of completed windows]
};

void compress_quantize(const CompressDecodeArgs& args, const CpuContext& context);
void compress_quantize(const CompressPrefillArgs& args, const CpuContext& context);

// Values 0, gates -inf, for num_states states.
void reset_compressor_states(CompressorKind kind, float* state_value, float* state_gate, int64_t num_states,
                             const CpuContext& context);

}  // namespace dsv4
