// Sinkhorn of 4x4 matrices by one warp, eight matrices at once (spec 2.2 step 8): no division inside the iterations.
//
// The iterates are diag(u) K diag(v) with K the row softmax + eps. A column step is v_k <- v_k / t_k, t_k = v_k (sum_j K_jk u_j) + eps. Kept
// instead: v_k times a factor common to all k. Then v_k / t_k becomes v_k times the product of the other three t, and only the product w
// of u's and v's common factors must be known, to scale eps: w <- t_0 t_1 t_2 t_3. A power of two, chosen from w before the sums are
// known, keeps it near 1 (the four t sum to about 4 w from the second step on, so that their product is at most about w^4). The chain of one
// step is eight multiplications deep: 52 clocks measured, against 107 with one reciprocal a step.
#pragma once

#include "gpu/ptx/convert.cuh"

namespace dsv4 {

// v: of the rows or columns being normalised; u: of the other ones. kOwn, kOther: strides of k in v's and in u's direction.
template <int kOwn, int kOther>
__device__ __forceinline__ void sinkhorn_step(const float (&k)[16], const float (&u)[4], float (&v)[4], float& w,
                                              float eps) {
  const float scale = __uint_as_float((635u << 23) - ((__float_as_uint(w) >> 23) << 25));  // 2^(-4 exponent(w))
  const float scaled_eps = eps * w;
  float t[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum = k[i * kOwn] * u[0];
#pragma unroll
    for (int j = 1; j < 4; ++j) sum = __fmaf_rn(k[i * kOwn + j * kOther], u[j], sum);
    t[i] = __fmaf_rn(v[i], sum, scaled_eps);
  }
  const float t01 = t[0] * t[1], t23 = t[2] * t[3], scaled01 = t01 * scale, scaled23 = t23 * scale;
  w = t01 * scaled23;
  v[0] = (v[0] * t[1]) * scaled23, v[1] = (v[1] * t[0]) * scaled23, v[2] = (v[2] * t[3]) * scaled01,
  v[3] = (v[3] * t[2]) * scaled01;
}

// Lane 8 j + m holds row j of matrix m: its logits in, its row of the result out. The whole warp comes here.
__device__ __forceinline__ float4 sinkhorn(const float (&logits)[4], int iters, float eps) {
  const float max = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
  float row[4], sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += row[i] = ptx::exp2_approx((logits[i] - max) * 1.44269504f);
  const float factor = __frcp_rn(sum);
#pragma unroll
  for (int i = 0; i < 4; ++i) row[i] = __fmaf_rn(row[i], factor, eps);
  float k[16];  // every lane has the whole matrix: 23 clocks an exchange would be too long inside the iterations
#pragma unroll
  for (int i = 0; i < 16; ++i) k[i] = __shfl_sync(0xffffffffu, row[i % 4], i / 4 * 8 + threadIdx.x % 8);
  float u[4] = {1, 1, 1, 1}, v[4] = {1, 1, 1, 1}, w = 1;
  sinkhorn_step<1, 4>(k, u, v, w, eps);
  {  // the first column sums may be tiny
    const uint32_t exponent = __float_as_uint(w) & 0x7f800000u;
    const float scale = __uint_as_float((254u << 23) - exponent);
    w *= scale;
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] *= scale;
  }
#pragma unroll 1
  for (int iter = 1; iter < iters; ++iter) {
    sinkhorn_step<4, 1>(k, v, u, w, eps);
    sinkhorn_step<1, 4>(k, u, v, w, eps);
  }
  const uint32_t j = threadIdx.x % 32 / 8;
  const float own = (j == 0 ? u[0] : j == 1 ? u[1] : j == 2 ? u[2] : u[3]) * __frcp_rn(w);
  return {row[0] * own * v[0], row[1] * own * v[1], row[2] * own * v[2], row[3] * own * v[3]};
}

}  // namespace dsv4
