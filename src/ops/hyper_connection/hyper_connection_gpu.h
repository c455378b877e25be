// hyper_connection_boundary: everything between two sub-layers in one kernel (spec 2.2-2.5): post of the site just left, pre of the
// next one (fp32 mix GEMM with 24 outputs, Sinkhorn), its RMS norm, and the quantiser of the sub-layer's input. Four bf16 streams.
//
// Numbers: as hyper_connection.h with round_output; fn enters as the sum of two bf16 (2^-18 of each weight is lost; TF32, which production
// engines use here, loses 2^-11), sums of the mix in binary32 in an order fixed by hidden and out.format, sigmoid, softmax and rms of the streams by the
// hardware's approximations, Sinkhorn without divisions: post and comb within 1e-5 of the CPU for logits of order 1. From the collapsed row on
// (norm, quantiser) the bytes are those of quantize_rows. A token's result does not depend on the other tokens of the call.
#pragma once

#include "gpu/context.h"
#include "ops/quantize/quantize.h"

namespace dsv4 {

struct HcBoundaryArgs {
  const bf16* streams;       // [num_tokens, 4, hidden] input of the site just left; this and all below 16-byte aligned
  const bf16* sublayer_out;  // [num_tokens, hidden]; nullptr: nothing to spread (first site), streams as they are
  const float* post;         // [num_tokens, 4] of the site just left
  const float* comb;         // [num_tokens, 4, 4]
  bf16* streams_out;         // [num_tokens, 4, hidden]; may be streams; unused without sublayer_out

  const float* fn;     // [24, 4 * hidden]; head: [4, 4 * hidden]
  const float* scale;  // [3]; head: [1]
  const float* base;   // [24]; head: [4]
  float* post_out;     // [num_tokens, 4] of the next site; may be post. Head: unused
  float* comb_out;     // [num_tokens, 4, 4]; may be comb. Head: unused
  bool head;           // collapse after the last layer: no post, no Sinkhorn

  const bf16* norm_weight;  // [hidden]; nullptr: the collapsed row itself goes to out
  QuantizedRows out;        // [num_tokens, hidden]; out.y beside the codes if not nullptr
  int64_t num_tokens;       // 0 is legal
  // A multiple of 256 from 512 (asynchronous cluster stores need a cluster) to 4096, or of 512 up to 8192.
  int64_t hidden;
  int sinkhorn_iters;
  float hc_eps, rms_eps;
};

void hyper_connection_boundary(const HcBoundaryArgs& args, const GpuContext& context);

}  // namespace dsv4
