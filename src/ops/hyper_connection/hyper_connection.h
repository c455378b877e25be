// Hyper-connections (mHC): four residual streams mixed around each sub-layer. Spec section 2.
//
//   pre:  m = rms(f) * (fn f) with f = the streams concatenated (rms over num_hc * hidden, eps = rms_norm_eps, no weight);
//         pre_j = sigmoid(m_j scale0 + base_j) + hc_eps; post_j = 2 sigmoid(...scale1...); C = Sinkhorn(...scale2...);
//         y = sum_j pre_j X_j
//   post: X'_k = post_k f_out + sum_j C[j][k] X_j          (C applied transposed)
//   head: w_k = sigmoid(m_k scale0 + base_k) + hc_eps; y = sum_k w_k X_k
// Mixing parameters and results are binary32; y and X' are rounded to bf16 outside exact mode.
// Sinkhorn: row softmax, + eps, column division; then (iters - 1) times row then column division, sums + eps.
// hc_pre and hc_head throw for num_hc outside 1..kMaxHcStreams, hc_post and hc_split check nothing; pointers are not checked.
#pragma once

#include <cstdint>

#include "ops/cpu_context.h"

namespace dsv4 {

constexpr int kMaxHcStreams = 8;

struct HcParams {
  const float* fn;     // [(2 + num_hc) * num_hc, num_hc * hidden]; head: [num_hc, num_hc * hidden]
  const float* scale;  // [3]; head: [1]
  const float* base;   // [(2 + num_hc) * num_hc]; head: [num_hc]
};

struct HcShape {
  int64_t num_tokens;
  int64_t hidden;
  int num_hc;  // <= kMaxHcStreams
  int sinkhorn_iters;
  float hc_eps;
  float rms_eps;
  bool round_output;  // to bf16
};

// streams: [num_tokens, num_hc, hidden]; y: [num_tokens, hidden]; post: [num_tokens, num_hc];
// comb: [num_tokens, num_hc, num_hc]
void hc_pre(const HcShape& shape, const HcParams& params, const float* streams, float* y, float* post, float* comb,
            const CpuContext& context);

// streams: [num_tokens, num_hc, hidden], updated in place; sublayer_out: [num_tokens, hidden]
void hc_post(const HcShape& shape, const float* sublayer_out, const float* post, const float* comb, float* streams,
             const CpuContext& context);

// y: [num_tokens, hidden]
void hc_head(const HcShape& shape, const HcParams& params, const float* streams, float* y, const CpuContext& context);

// Steps 5 to 8 of spec 2.2 for one token: m [(2 + num_hc) * num_hc] -> pre, post, comb.
void hc_split(const float* m, const HcParams& params, const HcShape& shape, float* pre, float* post, float* comb);

}  // namespace dsv4
