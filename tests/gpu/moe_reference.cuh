// Slow, plain MoE on the GPU from the checkpoint's linear layout: what the kernels are compared with. Also makes test data.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "codec/nvfp4.h"
#include "ops/moe/moe_pack_sm90.h"
#include "ops/moe/swiglu.h"

namespace dsv4::testing {

// All experts in linear layout, contiguous. w1/w3: [num_experts, inter, hidden], w2: [num_experts, hidden, inter].
struct LinearExperts {
  uint8_t *w1, *w3, *w2;        // codes
  uint8_t *sf1, *sf3, *sf2;     // ue4m3
  float* globals;               // [num_experts, 3]
  int hidden, inter, num_experts, num_topk;
};

__host__ __device__ inline uint64_t mix(uint64_t z) {
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

__global__ inline void fill_random_bytes(uint8_t* p, int64_t n, uint64_t seed) {
  for (int64_t i = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * 8; i < n; i += int64_t(gridDim.x) * blockDim.x * 8) {
    const uint64_t r = mix(seed * 0x100000001b3ull + i);
    for (int j = 0; j < 8 && i + j < n; ++j) p[i + j] = static_cast<uint8_t>(r >> (8 * j));
  }
}
// Scales: codes first .. first + count - 1; every_scale additionally mixes in zeros and subnormals.
__global__ inline void fill_random_sf(uint8_t* p, int64_t n, int first, int count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    p[i] = static_cast<uint8_t>(first + mix(seed * 0x100000001b3ull + i) % count);
}
__global__ inline void fill_normal_bf16(bf16* p, int64_t n, float sigma, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const uint64_t r = mix(seed * 0x100000001b3ull + i);
    const float u1 = (static_cast<float>(r & 0xffffff) + 1.0f) * 0x1p-24f, u2 = static_cast<float>((r >> 24) & 0xffffff) * 0x1p-24f;
    p[i] = encode_bf16(sigma * sqrtf(-2.0f * logf(u1)) * cospif(2.0f * u2));
  }
}

__device__ inline float warp_sum(float v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
// One warp: dot product of a vector and a linear NVFP4 row, without the global.
__device__ inline float dot_row(const float* v, const uint8_t* codes, const uint8_t* sf, int cols) {
  float sum = 0.0f;
  for (int group = threadIdx.x % 32; group < cols / 16; group += 32) {
    const float scale = decode_ue4m3(sf[group]);
    float part = 0.0f;
    for (int j = 0; j < 8; ++j) {
      const uint8_t byte = codes[group * 8 + j];
      part = fmaf(decode_e2m1(byte & 0xf), v[group * 16 + 2 * j], part);
      part = fmaf(decode_e2m1(byte >> 4), v[group * 16 + 2 * j + 1], part);
    }
    sum = fmaf(part, scale, sum);
  }
  return warp_sum(sum);
}

// x rows as binary32; a4: quantised and decoded without the global, which goes to globals[row].
template <class Source>
__global__ void reference_rows(const Source* source, int64_t rows, int cols, bool nvfp4, float* out, float* globals) {
  const int64_t row = blockIdx.x;
  __shared__ float shared[32];
  const auto load = [&](int c) {
    if constexpr (sizeof(Source) == 2)
      return decode_bf16(reinterpret_cast<const bf16*>(source)[row * cols + c]);
    else
      return reinterpret_cast<const float*>(source)[row * cols + c];
  };
  if (!nvfp4) {
    for (int c = threadIdx.x; c < cols; c += blockDim.x) out[row * cols + c] = load(c);
    if (threadIdx.x == 0) globals[row] = 1.0f;
    return;
  }
  float amax = 0.0f;
  for (int c = threadIdx.x; c < cols; c += blockDim.x) amax = fmaxf(amax, fabsf(load(c)));
  for (int d = 16; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = amax;
  __syncthreads();
  amax = 0.0f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) amax = fmaxf(amax, shared[w]);
  const GlobalScale global = nvfp4_global_scale(amax);
  if (threadIdx.x == 0) globals[row] = global.value;
  for (int group = threadIdx.x; group < cols / 16; group += blockDim.x) {
    float v[16];
    for (int i = 0; i < 16; ++i) v[i] = load(group * 16 + i);
    const Nvfp4Group q = encode_nvfp4_runtime_group(v, global, nvfp4_rcp6(global));
    for (int i = 0; i < 16; ++i)
      out[row * cols + group * 16 + i] = decode_e2m1((q.codes[i / 2] >> (i % 2 * 4)) & 0xf) * decode_ue4m3(q.sf);
  }
}
// blockIdx.x: slot; a warp per h column.
__global__ inline void reference_fc1(LinearExperts w, const float* x, const float* x_global, const int32_t* topk_idx, const float* rho,
                                     float limit, bool round_h, float* h) {
  const int64_t slot = blockIdx.x;
  const int e = topk_idx[slot];
  if (e < 0 || e >= w.num_experts) return;
  const int64_t token = slot / w.num_topk;
  for (int c = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32; c < w.inter; c += gridDim.y * (blockDim.x / 32)) {
    const int64_t row = int64_t(e) * w.inter + c;
    const float g = dot_row(x + token * w.hidden, w.w1 + row * (w.hidden / 2), w.sf1 + row * (w.hidden / 16), w.hidden);
    const float u = dot_row(x + token * w.hidden, w.w3 + row * (w.hidden / 2), w.sf3 + row * (w.hidden / 16), w.hidden);
    const float v = swiglu(round_bf16(g * (x_global[token] * w.globals[e * 3])), round_bf16(u * (x_global[token] * w.globals[e * 3 + 1])),
                           rho[slot], limit);
    if (threadIdx.x % 32 == 0) h[slot * w.inter + c] = round_h ? round_bf16(v) : v;
  }
}
__global__ inline void reference_fc2(LinearExperts w, const float* h, const float* h_global, const int32_t* topk_idx, float* slot_y) {
  const int64_t slot = blockIdx.x;
  const int e = topk_idx[slot];
  for (int c = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32; c < w.hidden; c += gridDim.y * (blockDim.x / 32)) {
    float y = 0.0f;
    if (e >= 0 && e < w.num_experts) {
      const int64_t row = int64_t(e) * w.hidden + c;
      y = round_bf16(dot_row(h + slot * w.inter, w.w2 + row * (w.inter / 2), w.sf2 + row * (w.inter / 16), w.inter) *
                     (h_global[slot] * w.globals[e * 3 + 2]));
    }
    if (threadIdx.x % 32 == 0) slot_y[slot * w.hidden + c] = y;
  }
}
__global__ inline void reference_combine(LinearExperts w, const float* slot_y, const int32_t* topk_idx, const bf16* shared_y, float* y) {
  const int64_t token = blockIdx.x;
  for (int c = threadIdx.x; c < w.hidden; c += blockDim.x) {
    float sum = 0.0f;
    for (int e = 0; e < w.num_experts; ++e)
      for (int k = 0; k < w.num_topk; ++k)
        if (topk_idx[token * w.num_topk + k] == e) sum += slot_y[(token * w.num_topk + k) * w.hidden + c];
    if (shared_y) sum += decode_bf16(shared_y[token * w.hidden + c]);
    y[token * w.hidden + c] = round_bf16(sum);
  }
}
// errors[0] += sum (y - ref)^2, errors[1] += sum ref^2, bad += y that are NaN or infinite, or differ in 16 bits from other (if given)
__global__ inline void compare_rows(const bf16* y, const float* reference, const bf16* other, int64_t n, double* errors,
                                    unsigned long long* bad) {
  double e = 0, r = 0;
  unsigned long long b = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const float v = decode_bf16(y[i]);
    if (!isfinite(v)) ++b;
    if (other && other[i].bits != y[i].bits) ++b;
    if (reference) {
      e += double(v - reference[i]) * (v - reference[i]);
      r += double(reference[i]) * reference[i];
    }
  }
  atomicAdd(&errors[0], e);
  atomicAdd(&errors[1], r);
  if (b) atomicAdd(bad, b);
}

}  // namespace dsv4::testing
