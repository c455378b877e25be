// The two kernels behind every quantiser: a stream over vectors of 16 elements, and one CTA per row where a row must be seen
// whole (RMS norm, global per row). A Source yields the elements; write_vector() writes any RowFormat.
//
//   struct Source {
//     struct Raw;                                               // registers of one vector, as loaded
//     Raw load(uint32_t row, uint32_t vec) const;               // elements 16 vec .. 16 vec + 15 of the row
//     void values(const Raw&, uint32_t row, uint32_t vec, float (&x)[16]) const;
//     uint32_t order(uint32_t thread) const;                    // which of 256 vectors the thread takes; keeps aligned eights
//     struct Shared; void prepare(Shared&);                     // stream kernel: fills and keeps shared memory; nothing for most
//   };
// A lane holds one NVFP4 group; eight neighbouring lanes share an FP8 block: all lanes of a warp take part in exchanges.
#pragma once

#include "codec/fp8_block.h"
#include "gpu/context.h"
#include "gpu/fast_div.h"
#include "gpu/launch.h"
#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"
#include "ops/quantize/encode_device.cuh"
#include "ops/quantize/quantize.h"
#include "ops/quantize/store_device.cuh"

namespace dsv4 {

constexpr int kStreamThreads = 256;
constexpr int kRowThreadsMax = 512;
constexpr uint32_t kStreamCtasPerSm = 4;

struct NoShared {};

struct QuantizeShape {
  uint32_t num_rows;
  uint32_t vecs_per_row;    // cols / 16
  uint32_t num_vecs;        // num_rows * vecs_per_row
  uint32_t sf_matrix_rows;  // 128x4: rows of one matrix, its bytes, tiles of four groups across
  uint32_t quads_per_row;
  int64_t sf_matrix_bytes;
  gpu::FastDiv by_vecs_per_row, by_sf_matrix_rows;
};

__device__ __forceinline__ void widen_bf16x16(uint4 low, uint4 high, float (&x)[16]) {
  const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    x[2 * j] = ptx::low_bf16(words[j]);
    x[2 * j + 1] = ptx::high_bf16(words[j]);
  }
}

// One matrix is at most 2^31 bytes of scales, so that 32-bit arithmetic does inside it.
__device__ __forceinline__ int64_t sf_position_128x4(const QuantizeShape& shape, uint32_t row, uint32_t group) {
  const uint32_t matrix = shape.sf_matrix_rows == shape.num_rows ? 0 : shape.by_sf_matrix_rows.quotient(row), m = row - matrix * shape.sf_matrix_rows;
  return matrix * shape.sf_matrix_bytes + ((m / 128) * shape.quads_per_row + group / 4) * 512 + (m % 32) * 16 + (m % 128) / 32 * 4 + group % 4;
}

// Largest magnitude of a vector, NaN ignored, and whether it holds a NaN.
struct VectorAmax {
  float value;
  bool has_nan;
};
__device__ __forceinline__ VectorAmax vector_amax(const float (&x)[16]) {
  VectorAmax amax;
  amax.value = amax_of(x, &amax.has_nan);
  return amax;
}

// One vector of a row whose global scale is known. Every lane of the warp must come here, with consecutive vectors; valid: this
// lane has one.
__device__ __forceinline__ void write_vector(const QuantizedRows& out, const QuantizeShape& shape, uint32_t row, uint32_t vec, bool valid,
                                             const float (&x)[16], VectorAmax vector, float global, float rcp6) {
  const int64_t v = int64_t{row} * shape.vecs_per_row + vec;
  if (out.y) {
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) pairs[i] = ptx::cvt_bf16x2(x[2 * i], x[2 * i + 1]);
    store_pieces<2>(out.y, 2 * v, valid, {pairs[0], pairs[1], pairs[2], pairs[3]}, {pairs[4], pairs[5], pairs[6], pairs[7]});
  }
  if (out.format == RowFormat::kBf16) return;
  if (out.format == RowFormat::kNvfp4) {
    if (!valid) return;
    const Nvfp4GroupScale scale = nvfp4_group_scale(vector.value, global, rcp6);
    reinterpret_cast<uint2*>(out.codes)[v] = encode_e2m1x16(x, scale.multiplier, vector.value, vector.has_nan);
    if (out.sf_layout == SfLayout::kLinear) {
      out.sf[v] = static_cast<uint8_t>(scale.sf);
    } else {
      const int64_t at = sf_position_128x4(shape, row, vec);
      out.sf[at] = static_cast<uint8_t>(scale.sf);
      if (vec + 1 == shape.vecs_per_row)
        for (uint32_t pad = 1; (vec + pad) % 4 != 0; ++pad) out.sf[at + pad] = 0;
    }
  } else {
    float amax = vector.value;
#pragma unroll
    for (int step = 1; step < 8; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
    if (!valid) return;
    const uint32_t scale = fp8_block_scale(amax);
    const float factor = rcp_ue8m0(scale);
    const uint2 low = encode_e4m3x8(x, factor), high = encode_e4m3x8(x + 8, factor);
    reinterpret_cast<uint4*>(out.codes)[v] = {low.x, low.y, high.x, high.y};
    if (vec % 8 == 0) out.sf[v / 8] = static_cast<uint8_t>(scale);
  }
}

// Zeroes the scale rows that pad each 128x4 matrix.
__device__ __forceinline__ void zero_sf_padding(const QuantizedRows& out, const QuantizeShape& shape, uint32_t thread, uint32_t num_threads) {
  if (out.format != RowFormat::kNvfp4 || out.sf_layout != SfLayout::k128x4) return;
  const uint32_t pad_rows = (128 - shape.sf_matrix_rows % 128) % 128, per_matrix = pad_rows * shape.quads_per_row;
  if (pad_rows == 0) return;
  for (uint32_t i = thread; i < per_matrix * (shape.num_rows / shape.sf_matrix_rows); i += num_threads) {
    const uint32_t matrix = i / per_matrix, m = shape.sf_matrix_rows + i % per_matrix / shape.quads_per_row, quad = i % shape.quads_per_row;
    const int64_t at = matrix * shape.sf_matrix_bytes + ((m / 128) * shape.quads_per_row + quad) * 512 + (m % 32) * 16 + (m % 128) / 32 * 4;
    *reinterpret_cast<uint32_t*>(out.sf + at) = 0;
  }
}

// A CTA takes vecs_per_thread * 256 consecutive vectors; a thread loads its next vector before it works on the current one.
template <class Source>
__global__ void __launch_bounds__(kStreamThreads, Source::kMinCtas) quantize_stream(Source source, const QuantizedRows out, const QuantizeShape shape, uint32_t vecs_per_thread) {
  __shared__ typename Source::Shared shared;
  source.prepare(shared);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const uint32_t ordered = source.order(threadIdx.x);
  uint32_t first = blockIdx.x * vecs_per_thread * kStreamThreads;
  float global = out.global_mode == GlobalMode::kGiven ? out.global[0] : 1.0f;
  float rcp6 = nvfp4_rcp6({global});
  typename Source::Raw raw, next;
  uint32_t row = shape.by_vecs_per_row.quotient(first + ordered), vec = first + ordered - row * shape.vecs_per_row;
  if (first + ordered < shape.num_vecs) raw = source.load(row, vec);
#pragma unroll 1
  for (uint32_t i = 0; i < vecs_per_thread; ++i, first += kStreamThreads) {
    if (first + threadIdx.x / 32 * 32 >= shape.num_vecs) break;  // whole warps leave together
    const uint32_t next_v = first + kStreamThreads + ordered;
    const uint32_t next_row = shape.by_vecs_per_row.quotient(next_v), next_vec = next_v - next_row * shape.vecs_per_row;
    if (i + 1 < vecs_per_thread && next_v < shape.num_vecs) next = source.load(next_row, next_vec);
    const bool valid = first + ordered < shape.num_vecs;
    float x[16] = {};
    if (valid) {
      if (out.global_mode == GlobalMode::kPerRow) {
        global = out.global[row];
        rcp6 = nvfp4_rcp6({global});
      }
      source.values(raw, row, vec, x);
    }
    write_vector(out, shape, row, vec, valid, x, vector_amax(x), global, rcp6);
    raw = next, row = next_row, vec = next_vec;
  }
  zero_sf_padding(out, shape, blockIdx.x * kStreamThreads + threadIdx.x, gridDim.x * kStreamThreads);
}

struct RowNorm {
  const bf16* weight;  // nullptr: no norm
  float eps;
};

// Sum (double) or maximum (float) over the CTA; every thread gets it.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (uint32_t w = 0; w < blockDim.x / 32; ++w) sum += scratch[w];
  return sum;
}
__device__ __forceinline__ float block_max(float value, float* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float max = 0;
  for (uint32_t w = 0; w < blockDim.x / 32; ++w) max = fmaxf(max, scratch[w]);
  return max;
}

// One CTA per row; thread t holds vectors t, t + blockDim, ... (kVecs of them) in registers. A persistent form that loads the next
// row early was slower (docs/kernels/quantize.md).
template <class Source, int kVecs>
__global__ void __launch_bounds__(kRowThreadsMax) quantize_row(const Source source, const QuantizedRows out, const QuantizeShape shape,
                                                               const RowNorm norm) {
  __shared__ double sum_scratch[kRowThreadsMax / 32];
  __shared__ float max_scratch[kRowThreadsMax / 32];
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const uint32_t row = blockIdx.x;
  typename Source::Raw raw[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i)
    if (threadIdx.x + i * blockDim.x < shape.vecs_per_row) raw[i] = source.load(row, threadIdx.x + i * blockDim.x);
  float x[kVecs][16] = {};
#pragma unroll
  for (int i = 0; i < kVecs; ++i)
    if (threadIdx.x + i * blockDim.x < shape.vecs_per_row) source.values(raw[i], row, threadIdx.x + i * blockDim.x, x[i]);

  if (norm.weight) {
    uint4 weight[kVecs][2] = {};
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const uint32_t vec = threadIdx.x + i * blockDim.x;
      if (vec < shape.vecs_per_row) {
        weight[i][0] = reinterpret_cast<const uint4*>(norm.weight)[2 * vec];
        weight[i][1] = reinterpret_cast<const uint4*>(norm.weight)[2 * vec + 1];
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) sum = __fma_rn(static_cast<double>(x[i][j]), static_cast<double>(x[i][j]), sum);
    }
    const float mean = __fdiv_rn(static_cast<float>(block_sum(sum, sum_scratch)), static_cast<float>(shape.vecs_per_row * 16));
    const float factor = __frcp_rn(__fsqrt_rn(mean + norm.eps));
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const uint32_t words[8] = {weight[i][0].x, weight[i][0].y, weight[i][0].z, weight[i][0].w,
                                 weight[i][1].x, weight[i][1].y, weight[i][1].z, weight[i][1].w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t pair = ptx::cvt_bf16x2(ptx::low_bf16(words[j]) * (x[i][2 * j] * factor), ptx::high_bf16(words[j]) * (x[i][2 * j + 1] * factor));
        x[i][2 * j] = ptx::low_bf16(pair);
        x[i][2 * j + 1] = ptx::high_bf16(pair);
      }
    }
  }

  float global = 1.0f;
  if (out.global_mode == GlobalMode::kGiven) global = out.global[0];
  if (out.global_mode == GlobalMode::kPerRow) global = out.global[row];
  if (out.global_mode == GlobalMode::kComputeRow) {
    float largest = 0;  // found again per vector below: keeping it across the barrier cost more (docs/kernels/quantize.md)
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
#pragma unroll
      for (int j = 0; j < 16; ++j) largest = fmaxf(largest, fabsf(x[i][j]));
    global = nvfp4_global_scale(block_max(largest, max_scratch)).value;
    if (threadIdx.x == 0) out.row_global[row] = global;
  }
  const float rcp6 = nvfp4_rcp6({global});
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint32_t vec = threadIdx.x + i * blockDim.x;
    if (vec - threadIdx.x % 32 >= shape.vecs_per_row) break;
    write_vector(out, shape, row, vec, vec < shape.vecs_per_row, x[i], vector_amax(x[i]), global, rcp6);
  }
  zero_sf_padding(out, shape, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}

inline QuantizeShape make_quantize_shape(const QuantizedRows& out, int64_t num_rows, int64_t cols) {
  const int64_t matrix_rows = out.sf_matrix_rows ? out.sf_matrix_rows : num_rows;
  QuantizeShape shape{};
  shape.num_rows = static_cast<uint32_t>(num_rows);
  shape.vecs_per_row = static_cast<uint32_t>(cols / 16);
  shape.num_vecs = shape.num_rows * shape.vecs_per_row;
  shape.sf_matrix_rows = static_cast<uint32_t>(matrix_rows);
  shape.by_sf_matrix_rows = gpu::FastDiv(shape.sf_matrix_rows);
  shape.quads_per_row = (shape.vecs_per_row + 3) / 4;
  shape.sf_matrix_bytes = sf_bytes(SfLayout::k128x4, matrix_rows, shape.vecs_per_row);
  shape.by_vecs_per_row = gpu::FastDiv(shape.vecs_per_row);
  return shape;
}

// Checks what all quantisers share, picks the kernel, launches.
template <class Source>
void launch_quantize(const char* op, const Source& source, const QuantizedRows& out, const RowNorm& norm, int64_t num_rows, int64_t cols,
                     const GpuContext& context) {
  DSV4_GPU_REQUIRE(op, cols > 0 && cols % (out.format == RowFormat::kFp8 ? kFp8ActBlock : kNvfp4GroupSize) == 0, "cols = %lld", static_cast<long long>(cols));
  DSV4_GPU_REQUIRE(op, num_rows >= 0 && num_rows * (cols / 16) < (int64_t{1} << 31) - 4096, "num_rows = %lld, cols = %lld: 2^31 groups at most",
                   static_cast<long long>(num_rows), static_cast<long long>(cols));
  DSV4_GPU_REQUIRE(op, out.format == RowFormat::kBf16 ? out.y != nullptr : out.codes && out.sf, "an output pointer is null");
  DSV4_GPU_REQUIRE(op, out.global_mode == GlobalMode::kOne || out.format == RowFormat::kNvfp4, "only kNvfp4 has a global scale");
  DSV4_GPU_REQUIRE(op, out.sf_layout == SfLayout::kLinear || out.format == RowFormat::kNvfp4, "only kNvfp4 has the 128x4 layout");
  if (num_rows == 0) return;
  const int64_t matrix_rows = out.sf_matrix_rows ? out.sf_matrix_rows : num_rows;
  DSV4_GPU_REQUIRE(op, num_rows % matrix_rows == 0, "num_rows = %lld is not a multiple of sf_matrix_rows = %lld", static_cast<long long>(num_rows),
                   static_cast<long long>(matrix_rows));
  const QuantizeShape shape = make_quantize_shape(out, num_rows, cols);
  gpu::LaunchConfig config{.stream = context.stream, .dependent = context.dependent};
  if (norm.weight || out.global_mode == GlobalMode::kComputeRow) {
    DSV4_GPU_REQUIRE(op, cols <= 16384, "cols = %lld: at most 16384 where a row must be seen whole", static_cast<long long>(cols));
    const uint32_t per_thread = cols <= 8192 ? 1 : 2;
    config.grid = shape.num_rows;
    config.block = (shape.vecs_per_row + 32 * per_thread - 1) / (32 * per_thread) * 32;
    if (per_thread == 1)
      gpu::launch(quantize_row<Source, 1>, config, source, out, shape, norm);
    else
      gpu::launch(quantize_row<Source, 2>, config, source, out, shape, norm);
  } else {
    // Enough CTAs to fill the machine several times over, then more vectors a thread.
    const uint32_t waves = shape.num_vecs / (static_cast<uint32_t>(context.num_sms) * kStreamThreads * kStreamCtasPerSm);
    const uint32_t vecs_per_thread = waves < 1 ? 1 : waves > Source::kMaxVecsPerThread ? Source::kMaxVecsPerThread : waves;
    config.grid = (shape.num_vecs + kStreamThreads * vecs_per_thread - 1) / (kStreamThreads * vecs_per_thread);
    config.block = kStreamThreads;
    gpu::launch(quantize_stream<Source>, config, source, out, shape, vecs_per_thread);
  }
}

}  // namespace dsv4
