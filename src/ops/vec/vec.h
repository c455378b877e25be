// Small vector kernels that the CPU ops are written in: one source, compiled once per instruction set.
//
// The reference table is plain loops with double sums. In the others, sums run over a fixed number of lanes and are folded
// in a fixed order, so a result depends on the instruction set but never on threads or batch size. exp is a polynomial
// within 2 ulp (std::exp in the reference).
#pragma once

#include <cstdint>

#include "ops/cpu_context.h"

namespace dsv4 {

struct VecKernels {
  // sum_i x[i]^2
  float (*sum_squares)(const float* x, int64_t n);
  // y[i] = x[i] * factor * weight[i], weight == nullptr: without. May alias.
  void (*scale)(const float* x, const float* weight, float factor, int64_t n, float* y);
  // y[i] = sum_j coeff[j] * x[j][i] for num_terms arrays
  void (*combine)(const float* const* x, const float* coeff, int num_terms, int64_t n, float* y);
  // scores[h][r] = scale * dot(q[h], rows[r]); q: [num_heads, dim] dense; scores rows score_stride apart
  void (*attend_scores)(const float* q, int num_heads, int64_t dim, const float* const* rows, int64_t num_rows,
                        float scale, float* scores, int64_t score_stride);
  // out[h] = sum_r p[h][r] * rows[r]; out: [num_heads, dim] dense
  void (*attend_values)(const float* p, int64_t p_stride, int num_heads, int64_t dim, const float* const* rows,
                        int64_t num_rows, float* out);
  // x[i] = exp(x[i] - max); returns the sum
  float (*exp_sum)(float* x, int64_t n, float max);
  // Softmax pooling per channel: out[c] = sum_s softmax_s(gate[s][c]) * value[s][c]; gate -inf = slot absent
  void (*softmax_pool)(const float* const* value, const float* const* gate, int num_slots, int64_t n, float* out);
  // out[j] = sum_h weight[h] * max(0, dot(q[h], keys[j])); q: [num_heads, dim], keys: [num_keys, dim], both dense
  void (*relu_scores)(const float* q, const float* weight, int num_heads, const float* keys, int64_t num_keys,
                      int64_t dim, float* out);
  void (*decode_bf16)(const uint16_t* x, int64_t n, float* y);
  void (*encode_bf16)(const float* x, int64_t n, uint16_t* y);
  void (*round_bf16)(float* x, int64_t n);
};

const VecKernels& vec_kernels(CpuIsa isa);

}  // namespace dsv4
