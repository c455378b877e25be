// Slow, plain MoE on the GPU from the checkpoint's linear layout, sums in binary64, with the interval of every output that a
// correct implementation can reach by adding in another order. What the kernels and the CPU op are both compared with.
//
// The bound, derived element by element:
//   1. A sum of K products that k16 matrix instructions make: each adds its 16 products and the running sum after aligning
//      them to the largest, cut off two bits below binary32, then truncates: at most 17 * 2^-25 + 2^-23 < 6 * 2^-23 of the
//      largest term (binary32 additions, as on the CPU, stay below that). A partial sum of any order that does not look at the
//      data is below M = |sum| + 6 s, s = sqrt(sum of squared products). So a sum is off by at most (K / 16 + 8) 6 2^-23 M;
//      the 8 covers adding partial sums of a split K and the roundings of the global scales.
//   2. gate and up lie between the bf16 roundings of their sum plus and minus that; most are one number.
//   3. h lies between the extremes of swiglu over those corners; in a16 both are rounded to bf16. In a4 the interval goes
//      through the run-time rule: largest and smallest row global, every scale code between the extremes, every e2m1 code.
//      The operand of fc2 is then off its nominal value by at most d (0 for most).
//   4. y_e is off by (1) plus 6 sqrt(sum (w d)^2), or sum |w d| if that is less: each d is bounded, its sign is open. bf16 of
//      both ends. Sums over experts are off by 2^-22 of their absolute sum. y lies between the bf16 roundings of the ends.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "codec/e4m3.h"
#include "codec/nvfp4.h"
#include "gpu/moe_case.cuh"
#include "ops/moe/swiglu.h"

namespace dsv4::testing {

constexpr double kTermError = 6 * 0x1p-23, kDeviations = 6;

// ---- rows of weights, sixteen columns at a time, without their global ----

struct Nvfp4Row {
  const uint8_t *codes, *sf;
  __device__ void group(int g, float (&w)[16]) const {
    const float scale = decode_ue4m3(sf[g]);
    for (int j = 0; j < 8; ++j) {
      const uint8_t byte = codes[g * 8 + j];
      w[2 * j] = decode_e2m1(byte & 0xf) * scale, w[2 * j + 1] = decode_e2m1(byte >> 4) * scale;
    }
  }
};
struct Fp8Row {
  const uint8_t* codes;
  const float* block_scales;  // of this row, one per 128 columns
  __device__ void group(int g, float (&w)[16]) const {
    for (int j = 0; j < 16; ++j) w[j] = decode_e4m3(codes[g * 16 + j]) * block_scales[g / 8];
  }
};
// row (of w1, w3, w2 = which 0, 1, 2) of an expert
struct Nvfp4Weights {
  LinearExperts w;
  __device__ int inter() const { return w.inter; }
  __device__ bool has(int e) const { return e >= 0 && e < w.num_experts; }
  __device__ Nvfp4Row row(int which, int e, int64_t r) const {
    const int64_t at = e * int64_t(which == 2 ? w.hidden : w.inter) + r, cols = which == 2 ? w.inter : w.hidden;
    const uint8_t* codes = which == 0 ? w.w1 : which == 1 ? w.w3 : w.w2;
    const uint8_t* sf = which == 0 ? w.sf1 : which == 1 ? w.sf3 : w.sf2;
    return {codes + at * (cols / 2), sf + at * (cols / 16)};
  }
  __device__ float global(int which, int e) const { return w.globals[e * 3 + which]; }
};
struct Fp8Weights {  // one expert
  const uint8_t* codes[3];
  const float* block_scales[3];
  int hidden, shared_inter;
  static Fp8Weights of(const SharedExpert& e) {
    return {{e.codes[0].as<uint8_t>(), e.codes[1].as<uint8_t>(), e.codes[2].as<uint8_t>()},
            {e.scales[0].as<float>(), e.scales[1].as<float>(), e.scales[2].as<float>()},
            e.hidden,
            e.inter};
  }
  __device__ int inter() const { return shared_inter; }
  __device__ bool has(int) const { return true; }
  __device__ Fp8Row row(int which, int, int64_t r) const {
    const int64_t cols = which == 2 ? shared_inter : hidden;
    return {codes[which] + r * cols, block_scales[which] + r / 128 * ((cols + 127) / 128)};
  }
  __device__ float global(int, int) const { return 1.0f; }
};

// ---- sums ----

struct Sum {
  double value = 0, squares = 0, spread_squares = 0, spread = 0;
};
__device__ inline double warp_sum(double v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
// One warp. spread: how far each v may be off, or nullptr.
template <class Row>
__device__ Sum dot_row(const float* v, const float* spread, const Row& row, int cols) {
  Sum sum;
  for (int g = threadIdx.x % 32; g < cols / 16; g += 32) {
    float w[16];
    row.group(g, w);
    for (int i = 0; i < 16; ++i) {
      const double product = double(w[i]) * v[g * 16 + i];
      sum.value += product;
      sum.squares = fma(product, product, sum.squares);
      if (spread && spread[g * 16 + i] != 0) {
        const double d = fabs(double(w[i]) * spread[g * 16 + i]);
        sum.spread += d;
        sum.spread_squares = fma(d, d, sum.spread_squares);
      }
    }
  }
  return {warp_sum(sum.value), warp_sum(sum.squares), warp_sum(sum.spread_squares), warp_sum(sum.spread)};
}
// How far the value of a sum of cols products may be off.
__device__ inline double sum_error(const Sum& s, int cols) {
  const double largest = fabs(s.value) + kDeviations * sqrt(s.squares);
  const double order = (cols / 16 + 8) * kTermError * largest;
  return order + fmin(kDeviations * sqrt(s.spread_squares), s.spread);
}

// ---- kernels; i counts sampled tokens, token_of their number in the layer ----

struct Bounds {
  float *value, *low, *high;
};

// x as the operand of fc1: binary32, in a4 quantised and decoded without the global. blockIdx.x: i.
__global__ inline void reference_x(const bf16* x, const int32_t* token_of, int cols, bool a4, float* out,
                                   float* globals) {
  const bf16* row = x + int64_t(token_of[blockIdx.x]) * cols;
  float* target = out + int64_t(blockIdx.x) * cols;
  if (!a4) {
    for (int c = threadIdx.x; c < cols; c += blockDim.x) target[c] = decode_bf16(row[c]);
    if (threadIdx.x == 0) globals[blockIdx.x] = 1.0f;
    return;
  }
  __shared__ float largest[1024];
  float amax = 0.0f;
  for (int c = threadIdx.x; c < cols; c += blockDim.x) amax = fmaxf(amax, fabsf(decode_bf16(row[c])));
  largest[threadIdx.x] = amax;
  __syncthreads();
  for (unsigned t = 0; t < blockDim.x; ++t) amax = fmaxf(amax, largest[t]);
  const GlobalScale global = nvfp4_global_scale(amax);
  if (threadIdx.x == 0) globals[blockIdx.x] = global.value;
  for (int g = threadIdx.x; g < cols / 16; g += blockDim.x) {
    float v[16];
    for (int j = 0; j < 16; ++j) v[j] = decode_bf16(row[g * 16 + j]);
    const Nvfp4Group q = encode_nvfp4_runtime_group(v, global, nvfp4_rcp6(global));
    for (int j = 0; j < 16; ++j)
      target[g * 16 + j] = decode_e2m1((q.codes[j / 2] >> (j % 2 * 4)) & 0xf) * decode_ue4m3(q.sf);
  }
}

struct ReferenceSlots {  // num_topk = 1 and no topk_idx: the shared expert
  const int32_t* token_of;
  const int32_t* topk_idx;  // of all tokens
  const float* rho;
  int num_topk;
  __device__ int64_t index(int64_t slot) const {
    return int64_t(token_of[slot / num_topk]) * num_topk + slot % num_topk;
  }
  __device__ int expert(int64_t slot) const { return topk_idx ? topk_idx[index(slot)] : 0; }
  __device__ float weight(int64_t slot) const { return rho ? rho[index(slot)] : 1.0f; }
};

// blockIdx.x: slot; a warp per h column.
template <class Weights>
__global__ void reference_fc1(Weights w, ReferenceSlots slots, const float* x, const float* x_global, int hidden,
                              float limit, Bounds h) {
  const int64_t slot = blockIdx.x, i = slot / slots.num_topk;
  const int e = slots.expert(slot), inter = w.inter();
  for (int c = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32; c < inter; c += gridDim.y * (blockDim.x / 32)) {
    float value = 0, low = 0, high = 0;
    if (w.has(e)) {
      float nominal[2], ends[2][2];
      for (int which = 0; which < 2; ++which) {
        const Sum s = dot_row(x + i * hidden, nullptr, w.row(which, e, c), hidden);
        const double scale = double(x_global[i]) * w.global(which, e), off = sum_error(s, hidden) * scale;
        nominal[which] = round_bf16(float(s.value * scale));
        ends[which][0] = round_bf16(float(s.value * scale - off)),
        ends[which][1] = round_bf16(float(s.value * scale + off));
      }
      const float rho = slots.weight(slot);
      value = low = high = swiglu(nominal[0], nominal[1], rho, limit);
      for (int corner = 0; corner < 4; ++corner) {
        const float v = swiglu(ends[0][corner & 1], ends[1][corner >> 1], rho, limit);
        low = fminf(low, v), high = fmaxf(high, v);
      }
    }
    if (threadIdx.x % 32 == 0)
      h.value[slot * inter + c] = value, h.low[slot * inter + c] = low, h.high[slot * inter + c] = high;
  }
}

// h -> the operand of fc2 and how far it may be off. blockIdx.x: slot. a4: in units of the nominal global.
__global__ inline void reference_h(Bounds h, int cols, bool a4, float* operand, float* spread, float* globals) {
  const int64_t at = int64_t(blockIdx.x) * cols;
  const float *value = h.value + at, *low = h.low + at, *high = h.high + at;
  if (!a4) {
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
      const float v = round_bf16(value[c]);
      operand[at + c] = v;
      spread[at + c] = fmaxf(fabsf(round_bf16(low[c]) - v), fabsf(round_bf16(high[c]) - v));
    }
    if (threadIdx.x == 0) globals[blockIdx.x] = 1.0f;
    return;
  }
  const auto smallest_of = [](float l, float u) { return l <= 0 && u >= 0 ? 0.0f : fminf(fabsf(l), fabsf(u)); };
  const auto largest_of = [](float l, float u) { return fmaxf(fabsf(l), fabsf(u)); };
  __shared__ float amax[3][256];
  float m[3] = {};
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    m[0] = fmaxf(m[0], fabsf(value[c]));
    m[1] = fmaxf(m[1], smallest_of(low[c], high[c]));
    m[2] = fmaxf(m[2], largest_of(low[c], high[c]));
  }
  for (int k = 0; k < 3; ++k) amax[k][threadIdx.x] = m[k];
  __syncthreads();
  for (unsigned t = 0; t < blockDim.x; ++t)
    for (int k = 0; k < 3; ++k) m[k] = fmaxf(m[k], amax[k][t]);
  const GlobalScale global = nvfp4_global_scale(m[0]), ends[2] = {nvfp4_global_scale(m[1]), nvfp4_global_scale(m[2])};
  if (threadIdx.x == 0) globals[blockIdx.x] = global.value;
  for (int g = threadIdx.x; g < cols / 16; g += blockDim.x) {
    bool exact = m[1] == m[2];
    float least = 0, most = 0;
    for (int j = g * 16; j < g * 16 + 16; ++j) {
      exact = exact && low[j] == high[j];
      least = fmaxf(least, smallest_of(low[j], high[j])), most = fmaxf(most, largest_of(low[j], high[j]));
    }
    const Nvfp4Group q = encode_nvfp4_runtime_group(value + g * 16, global, nvfp4_rcp6(global));
    const int first = nvfp4_runtime_sf(least, nvfp4_rcp6(ends[1])), last = nvfp4_runtime_sf(most, nvfp4_rcp6(ends[0]));
    for (int j = 0; j < 16; ++j) {
      const float nominal = decode_e2m1((q.codes[j / 2] >> (j % 2 * 4)) & 0xf) * decode_ue4m3(q.sf);
      float off = 0;
      if (!exact)
        for (int sf = first; sf <= last; ++sf)
          for (int corner = 0; corner < 8; ++corner) {
            const float v = corner & 1 ? high[g * 16 + j] : low[g * 16 + j];
            const float code =
                decode_e2m1(encode_e2m1(v * nvfp4_runtime_multiplier(static_cast<uint8_t>(sf), ends[corner >> 1 & 1])));
            off = fmaxf(off,
                        fabsf(code * decode_ue4m3(static_cast<uint8_t>(sf)) * (ends[corner >> 2].value / global.value) -
                              nominal));
          }
      operand[at + g * 16 + j] = nominal;
      spread[at + g * 16 + j] = off;
    }
  }
}

// blockIdx.x: slot; a warp per output column.
template <class Weights>
__global__ void reference_fc2(Weights w, ReferenceSlots slots, const float* h, const float* spread,
                              const float* h_global, int hidden, Bounds y) {
  const int64_t slot = blockIdx.x;
  const int e = slots.expert(slot), inter = w.inter();
  for (int c = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32; c < hidden; c += gridDim.y * (blockDim.x / 32)) {
    float value = 0, low = 0, high = 0;
    if (w.has(e)) {
      const Sum s = dot_row(h + slot * inter, spread + slot * inter, w.row(2, e, c), inter);
      const double scale = double(h_global[slot]) * w.global(2, e), off = sum_error(s, inter) * scale;
      value = round_bf16(float(s.value * scale));
      low = round_bf16(float(s.value * scale - off)), high = round_bf16(float(s.value * scale + off));
    }
    if (threadIdx.x % 32 == 0)
      y.value[slot * hidden + c] = value, y.low[slot * hidden + c] = low, y.high[slot * hidden + c] = high;
  }
}

// blockIdx.x: i. Slots in order of expert id (the order does not matter to the bounds), then the shared part.
__global__ inline void reference_combine(ReferenceSlots slots, int num_experts, int hidden, Bounds slot_y,
                                         const bf16* shared_y, Bounds shared, Bounds y) {
  const int64_t i = blockIdx.x, token = slots.token_of[i];
  for (int c = threadIdx.x; c < hidden; c += blockDim.x) {
    float value = 0;
    double low = 0, high = 0, size = 0;
    for (int e = 0; e < num_experts; ++e)
      for (int k = 0; k < slots.num_topk; ++k) {
        const int64_t slot = i * slots.num_topk + k, at = slot * hidden + c;
        if (slots.expert(slot) != e) continue;
        value += slot_y.value[at], low += slot_y.low[at], high += slot_y.high[at];
        size += fmax(fabs(slot_y.low[at]), fabs(slot_y.high[at]));
      }
    if (shared_y) {
      const float v = decode_bf16(shared_y[token * hidden + c]);
      value += v, low += v, high += v, size += fabs(v);
    }
    if (shared.value) {
      const int64_t at = i * hidden + c;
      value += shared.value[at], low += shared.low[at], high += shared.high[at];
      size += fmax(fabs(shared.low[at]), fabs(shared.high[at]));
    }
    y.value[i * hidden + c] = round_bf16(value);
    y.low[i * hidden + c] = round_bf16(float(low - 0x1p-22 * size));
    y.high[i * hidden + c] = round_bf16(float(high + 0x1p-22 * size));
  }
}

// sums: (y - value)^2, value^2, ((high - low) / 2)^2. outside: elements beyond their bounds, NaN included.
struct ComparisonSums {
  double error, value, width;
  unsigned long long outside;
};
template <class T>
__global__ void compare_with_bounds(const T* y, const int32_t* token_of, int64_t count, int hidden, Bounds bounds,
                                    ComparisonSums* sums) {
  double e = 0, r = 0, w = 0;
  unsigned long long outside = 0;
  for (int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; at < count * hidden;
       at += int64_t(gridDim.x) * blockDim.x) {
    const int64_t from = int64_t(token_of[at / hidden]) * hidden + at % hidden;
    float v;
    if constexpr (sizeof(T) == 2)
      v = decode_bf16(y[from]);
    else
      v = y[from];
    const double value = bounds.value[at], half = (double(bounds.high[at]) - bounds.low[at]) / 2;
    if (!(v >= bounds.low[at] && v <= bounds.high[at])) ++outside;
    e += (v - value) * (v - value), r += value * value, w += half * half;
  }
  atomicAdd(&sums->error, e);
  atomicAdd(&sums->value, r);
  atomicAdd(&sums->width, w);
  if (outside) atomicAdd(&sums->outside, outside);
}
__global__ inline void count_differences(const uint16_t* a, const uint16_t* b, int64_t n,
                                         unsigned long long* different) {
  unsigned long long d = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    d += a[i] != b[i];
  if (d) atomicAdd(different, d);
}

// ---- host side ----

struct BoundsBuffer {
  DeviceBuffer value, low, high;
  BoundsBuffer() = default;
  explicit BoundsBuffer(int64_t n) : value(n * 4), low(n * 4), high(n * 4) {}
  Bounds view() const { return {value.as<float>(), low.as<float>(), high.as<float>()}; }
};

struct Reference {
  ActFormat act;
  std::vector<int32_t> tokens;  // sampled
  DeviceBuffer token_of;
  BoundsBuffer y;  // [sampled, hidden]
};

template <class Weights>
BoundsBuffer reference_experts(const Weights& weights, const ReferenceSlots& slots, const float* x,
                               const float* x_global, int64_t num_slots, int hidden, int inter, float limit, bool a4,
                               cudaStream_t stream) {
  BoundsBuffer h(num_slots * inter), y(num_slots * hidden);
  DeviceBuffer operand(num_slots * inter * 4), spread(num_slots * inter * 4), globals(num_slots * 4);
  const unsigned blocks = static_cast<unsigned>(num_slots);
  reference_fc1<<<dim3(blocks, 16), 256, 0, stream>>>(weights, slots, x, x_global, hidden, limit, h.view());
  reference_h<<<blocks, 256, 0, stream>>>(h.view(), inter, a4, operand.as<float>(), spread.as<float>(),
                                          globals.as<float>());
  reference_fc2<<<dim3(blocks, 16), 256, 0, stream>>>(weights, slots, operand.as<float>(), spread.as<float>(),
                                                      globals.as<float>(), hidden, y.view());
  DSV4_CUDA(cudaGetLastError());
  DSV4_CUDA(cudaStreamSynchronize(stream));  // before the buffers go
  return y;
}

// tokens: which to compute; empty: all.
inline Reference make_reference(const LinearExperts& w, const Layer& l, ActFormat act, cudaStream_t stream,
                                std::vector<int32_t> tokens = {}, const Fp8Weights* shared = nullptr) {
  Reference r;
  r.act = act;
  if (tokens.empty())
    for (int32_t t = 0; t < l.tokens; ++t) tokens.push_back(t);
  r.tokens = std::move(tokens);
  const int64_t n = static_cast<int64_t>(r.tokens.size());
  const bool a4 = act == ActFormat::kNvfp4;
  r.token_of = DeviceBuffer(n * 4);
  gpu::copy_to_device(r.token_of.data(), r.tokens.data(), n * 4, stream);
  r.y = BoundsBuffer(n * w.hidden);
  DeviceBuffer x(n * w.hidden * 4), x_global(n * 4);
  const auto load_x = [&](bool quantise) {
    reference_x<<<unsigned(n), 256, 0, stream>>>(l.x.as<bf16>(), r.token_of.as<int32_t>(), w.hidden, quantise,
                                                 x.as<float>(), x_global.as<float>());
  };
  BoundsBuffer shared_y;
  if (shared) {  // always a16
    load_x(false);
    const ReferenceSlots slots{r.token_of.as<int32_t>(), nullptr, nullptr, 1};
    shared_y = reference_experts(*shared, slots, x.as<float>(), x_global.as<float>(), n, w.hidden, shared->shared_inter,
                                 10.0f, false, stream);
  }
  load_x(a4);
  const ReferenceSlots slots{r.token_of.as<int32_t>(), l.idx.as<int32_t>(), l.rho.as<float>(), w.num_topk};
  const BoundsBuffer slot_y = reference_experts(Nvfp4Weights{w}, slots, x.as<float>(), x_global.as<float>(),
                                                n * w.num_topk, w.hidden, w.inter, 10.0f, a4, stream);
  reference_combine<<<unsigned(n), 256, 0, stream>>>(slots, w.num_experts, w.hidden, slot_y.view(),
                                                     l.shared_y.as<bf16>(), shared_y.view(), r.y.view());
  DSV4_CUDA(cudaGetLastError());
  DSV4_CUDA(cudaStreamSynchronize(stream));
  return r;
}

struct Comparison {
  double relative, width;  // ||y - value|| / ||value||, ||half of the interval|| / ||value||
  unsigned long long outside;
};
template <class T>  // bf16 or float, [tokens, hidden] of the whole layer, device memory
Comparison compare(const T* y, const Reference& r, int hidden, cudaStream_t stream) {
  DeviceBuffer sums(sizeof(ComparisonSums));
  gpu::fill(sums.data(), 0, sums.bytes(), stream);
  compare_with_bounds<<<256, 256, 0, stream>>>(y, r.token_of.as<int32_t>(), static_cast<int64_t>(r.tokens.size()),
                                               hidden, r.y.view(), sums.as<ComparisonSums>());
  ComparisonSums host;
  gpu::copy_to_host(&host, sums.data(), sums.bytes(), stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  const double size = host.value > 0 ? std::sqrt(host.value) : 1.0;
  return {std::sqrt(host.error) / size, std::sqrt(host.width) / size, host.outside};
}
// 16-bit elements that differ.
inline unsigned long long differences(const void* a, const void* b, int64_t n, cudaStream_t stream) {
  DeviceBuffer count(8);
  gpu::fill(count.data(), 0, 8, stream);
  count_differences<<<256, 256, 0, stream>>>(static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), n,
                                             count.as<unsigned long long>());
  unsigned long long host;
  gpu::copy_to_host(&host, count.data(), 8, stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));
  return host;
}

}  // namespace dsv4::testing
