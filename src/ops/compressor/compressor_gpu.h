// The GPU side of compress_quantize.h: same arguments, pointers to device memory, one kernel (prefill: two), queued on context.stream. Positions are
// not negative. In HCA eight CTAs
// of a cluster share a window.
#pragma once

#include "gpu/context.h"
#include "ops/compressor/compress_quantize.h"

namespace dsv4 {

// With context.dependent only value and gate may come from the kernel right before: positions, states, rope_rows, slots and the state itself
// are read while it still runs. So that kernel is neither a prefill, a decode or a reset of the same states; and it lets its own dependents
// start only after its wait, as every kernel of this library does (what ran before it may have written the state).
void compress_quantize(const CompressDecodeArgs& args, const GpuContext& context);
void compress_quantize(const CompressPrefillArgs& args, const GpuContext& context);

// Values 0, gates -inf, for num_states states.
void reset_compressor_states(CompressorKind kind, float* state_value, float* state_gate, int64_t num_states,
                             const GpuContext& context);

}  // namespace dsv4
