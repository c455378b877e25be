// The kernels behind every quantiser. A Source yields vectors of 16 elements (one NVFP4 group); four kernels turn them into any
// RowFormat, and quantize_launch.cuh picks one:
//   quantize_stream   vectors are independent: a thread a vector, a few in a row. Any size, any layout.
//   quantize_row      a row must be seen whole (RMS norm, global per row): a CTA a row. Few rows, or long or odd ones.
//   quantize_ring     (quantize_ring.cuh) many rows: persistent warps fed by the copy engine.
//   quantize_team     (quantize_team.cuh) many rows of the models' widths that must be seen whole: held in registers.
//
//   struct Source {
//     struct Raw;                                                // registers of one vector, as loaded
//     void prefetch(uint32_t row, uint32_t vec) const;           // into L2
//     Raw load(uint32_t row, uint32_t vec) const;                // elements 16 vec .. 16 vec + 15 of the row
//     float row_factor(uint32_t row) const;                      // loaded early, handed to vector()
//     Vector16 vector(const Raw&, uint32_t row, uint32_t vec, float row_factor) const;
//     uint32_t order(uint32_t thread) const;                     // which of 256 vectors a stream thread takes; keeps aligned eights
//     static constexpr SourceTraits kTraits;
//     bool contiguous(uint32_t vecs_per_row) const;              // rows follow each other without gaps
//   };
// Eight neighbouring lanes share an FP8 block: all lanes of a warp take part in exchanges.
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

// What a Source is, and which forms of quantize_ring are compiled for it.
struct SourceTraits {
  bool has_rows = false;  // vectors depend on the row beyond their address
  int stream_ctas = 4;    // per SM, where rows are not contiguous
  bool ring_stream = false, ring_tiled = false, ring_rows = false, ring_norm = false;
  bool teams = false;           // rows that must be seen whole may go to quantize_team
  bool prepares = false;        // staged vectors are changed before they are read
  bool settles = false;         // values cost so much that a second pass finds them in the stage
  uint32_t vec_bytes = 32;      // of a vector's inputs
  uint32_t ring_rows_from = 0;  // vectors per multiprocessor from which on rows that must be seen whole go to the ring
};

constexpr int kStreamThreads = 256;
constexpr int kRowThreadsMax = 512;

struct QuantizeShape {
  uint32_t num_rows;
  uint32_t vecs_per_row;    // cols / 16
  uint32_t num_vecs;        // num_rows * vecs_per_row
  uint32_t sf_matrix_rows;  // 128x4: rows of one matrix, its bytes, tiles of four groups across
  uint32_t quads_per_row;
  int64_t sf_matrix_bytes;
  gpu::FastDiv by_vecs_per_row, by_sf_matrix_rows;
};

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

struct RowNorm {
  const bf16* weight;  // nullptr: no norm
  float eps;
};

// ---- vectors ----

struct Vector16 {
  float x[16];
  float amax;         // largest magnitude; NaN if one is
  uint32_t signs[4];  // of four elements each, in the top bits of bytes
};

__device__ __forceinline__ float amax_with_nan(const float (&x)[16]) {
  float largest[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    largest[j] = ptx::max_nan(ptx::max_nan(fabsf(x[4 * j]), fabsf(x[4 * j + 1])),
                              ptx::max_nan(fabsf(x[4 * j + 2]), fabsf(x[4 * j + 3])));
  return ptx::max_nan(ptx::max_nan(largest[0], largest[1]), ptx::max_nan(largest[2], largest[3]));
}

// Sets what follows from x.
__device__ __forceinline__ void finish_vector(Vector16& v) {
  v.amax = amax_with_nan(v.x);
#pragma unroll
  for (int j = 0; j < 4; ++j) v.signs[j] = signs_of_floats(v.x + 4 * j);
}

// Eight bf16 pairs as a vector; magnitudes are compared before they are widened.
__device__ __forceinline__ Vector16 vector_of_pairs(const uint32_t (&pairs)[8]) {
  Vector16 v;
  uint32_t largest[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    largest[j] = ptx::max_magnitude_bf16x2(pairs[2 * j], pairs[2 * j + 1]);
    v.signs[j] = signs_of_pairs(pairs[2 * j], pairs[2 * j + 1]);
  }
  largest[0] = ptx::max_magnitude_bf16x2(ptx::max_magnitude_bf16x2(largest[0], largest[1]),
                                         ptx::max_magnitude_bf16x2(largest[2], largest[3]));
  v.amax = ptx::max_nan(fabsf(ptx::low_bf16(largest[0])), fabsf(ptx::high_bf16(largest[0])));
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    v.x[2 * j] = ptx::low_bf16(pairs[j]);
    v.x[2 * j + 1] = ptx::high_bf16(pairs[j]);
  }
  return v;
}
__device__ __forceinline__ Vector16 vector_of_pairs(uint4 low, uint4 high) {
  const uint32_t pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  return vector_of_pairs(pairs);
}
__device__ __forceinline__ void pairs_of_vector(const Vector16& v, uint32_t (&pairs)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) pairs[j] = ptx::cvt_bf16x2(v.x[2 * j], v.x[2 * j + 1]);
}

// NaN ignored.
__device__ __forceinline__ float amax_of_numbers(const Vector16& v) {
  if (!isnan(v.amax)) return v.amax;
  float amax = 0;
#pragma unroll
  for (int j = 0; j < 16; ++j) amax = fmaxf(amax, fabsf(v.x[j]));
  return amax;
}

// weight * (x * factor), rounded to bf16.
__device__ __forceinline__ Vector16 normalized(const Vector16& v, const bf16* weight, uint32_t vec, float factor) {
  const uint4* at = reinterpret_cast<const uint4*>(weight) + 2 * vec;
  const uint4 low = __ldg(at), high = __ldg(at + 1);
  const uint32_t weights[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32_t pairs[8];
#pragma unroll
  for (int j = 0; j < 8; ++j)
    pairs[j] = ptx::cvt_bf16x2(ptx::low_bf16(weights[j]) * (v.x[2 * j] * factor),
                               ptx::high_bf16(weights[j]) * (v.x[2 * j + 1] * factor));
  return vector_of_pairs(pairs);
}
// From the row's mean square, or its sum of squares.
__device__ __forceinline__ float norm_factor(float mean, float eps) { return __frcp_rn(__fsqrt_rn(mean + eps)); }
__device__ __forceinline__ float norm_factor(double sum, uint32_t vecs_per_row, float eps) {
  return norm_factor(__fdiv_rn(static_cast<float>(sum), static_cast<float>(vecs_per_row * 16)), eps);
}

// ---- encoding ----

// nvfp4_plain_group_scale of two groups: one conversion each way does for both. group_scale[0].sf: its low byte counts.
__device__ __forceinline__ void nvfp4_plain_group_scales(const float (&amax16)[2], float global, float rcp6,
                                                         Nvfp4GroupScale (&group_scale)[2]) {
  const uint32_t codes = ptx::cvt_e4m3x2(__fmul_rn(amax16[0], rcp6), __fmul_rn(amax16[1], rcp6));
  const float2 decoded = ptx::cvt_f32_f16x2(ptx::cvt_f16x2_e4m3x2(codes));
  const float scaled = __fmul_rn(global, 1.0f / kSmallE2m1Scale);
  const float first = rcp_rn_normal(__fmul_rn(decoded.x, scaled)), second = rcp_rn_normal(__fmul_rn(decoded.y, scaled));
  group_scale[0] = {codes, decoded.x == 0 ? 0.0f : first};
  group_scale[1] = {codes >> 8, decoded.y == 0 ? 0.0f : second};
}

// kVecs vectors of this lane -> codes and scale bytes in the low bits of sf (kFp8: the block's byte in all of its eight
// lanes). Nothing branches until all are encoded, so that their instructions mix; what the short way cannot do (NaN, saturation,
// an extreme global) is done again, with again(k) for v[k].
template <RowFormat kFormat, int kVecs, class Again>
__device__ __forceinline__ void encode_vectors(const Vector16 (&v)[kVecs], float global, float rcp6, bool plain,
                                               uint4 (&codes)[kVecs], uint32_t (&sf)[kVecs], const Again& again) {
  if constexpr (kFormat == RowFormat::kNvfp4) {
    Nvfp4GroupScale group_scale[kVecs];
    if constexpr (kVecs == 2)
      nvfp4_plain_group_scales({v[0].amax, v[1].amax}, global, rcp6, group_scale);
    else
#pragma unroll
      for (int k = 0; k < kVecs; ++k) group_scale[k] = nvfp4_plain_group_scale(v[k].amax, global, rcp6);
    bool ok = plain;
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
      sf[k] = group_scale[k].sf;
      codes[k].x = encode_small_e2m1x8(v[k].x, group_scale[k].multiplier, v[k].signs[0], v[k].signs[1]);
      codes[k].y = encode_small_e2m1x8(v[k].x + 8, group_scale[k].multiplier, v[k].signs[2], v[k].signs[3]);
      ok = ok && __fmul_rn(v[k].amax, group_scale[k].multiplier) < 7.0f * kSmallE2m1Scale;
    }
    if (ok) return;
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
      const Vector16 w = again(k);
      const Nvfp4GroupScale scale = nvfp4_group_scale(amax_of_numbers(w), global, rcp6);
      sf[k] = scale.sf;
      codes[k].x = encode_any_e2m1x8(w.x, scale.multiplier);
      codes[k].y = encode_any_e2m1x8(w.x + 8, scale.multiplier);
    }
  } else if constexpr (kFormat == RowFormat::kFp8) {
    float amax[kVecs];
#pragma unroll
    for (int k = 0; k < kVecs; ++k) amax[k] = amax_of_numbers(v[k]);
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
      for (int k = 0; k < kVecs; ++k) amax[k] = fmaxf(amax[k], __shfl_xor_sync(0xffffffffu, amax[k], step));
#pragma unroll
    for (int k = 0; k < kVecs; ++k) {
      sf[k] = fp8_block_scale(amax[k]);
      const float factor = rcp_ue8m0(sf[k]);
      const uint2 low = encode_e4m3x8(v[k].x, factor), high = encode_e4m3x8(v[k].x + 8, factor);
      codes[k] = {low.x, low.y, high.x, high.y};
    }
  }
}

// Vector number v as bf16. Every lane of the warp must come here, an odd lane with the vector behind the even lane's.
__device__ __forceinline__ void write_bf16(const QuantizedRows& out, int64_t v, bool valid, const Vector16& vector) {
  uint32_t pairs[8];
  pairs_of_vector(vector, pairs);
  store_pieces<2>(out.y, 2 * v, valid, {pairs[0], pairs[1], pairs[2], pairs[3]},
                  {pairs[4], pairs[5], pairs[6], pairs[7]});
}

// Codes of vector number v.
template <RowFormat kFormat>
__device__ __forceinline__ void write_codes(const QuantizedRows& out, int64_t v, uint4 codes) {
  if constexpr (kFormat == RowFormat::kNvfp4) reinterpret_cast<uint2*>(out.codes)[v] = {codes.x, codes.y};
  if constexpr (kFormat == RowFormat::kFp8) reinterpret_cast<uint4*>(out.codes)[v] = codes;
}

// One matrix is at most 2^31 bytes of scales, so that 32-bit arithmetic does inside it.
__device__ __forceinline__ int64_t sf_position_128x4(const QuantizeShape& shape, uint32_t row, uint32_t group) {
  const uint32_t matrix = shape.sf_matrix_rows == shape.num_rows ? 0 : shape.by_sf_matrix_rows.quotient(row),
                 m = row - matrix * shape.sf_matrix_rows;
  return matrix * shape.sf_matrix_bytes + ((m / 128) * shape.quads_per_row + group / 4) * 512 + (m % 32) * 16 +
         (m % 128) / 32 * 4 + group % 4;
}

// One vector of a row, scale byte and all. Every lane of the warp must come here, with consecutive vectors v = row * vecs_per_row + vec;
// valid: this lane has one. again(): it once more, where the long way needs it (from shared memory it holds no registers until then).
template <RowFormat kFormat, class Again>
__device__ __forceinline__ void write_vector(const QuantizedRows& out, const QuantizeShape& shape, int64_t v,
                                             uint32_t row, uint32_t vec, bool valid, const Vector16& vector,
                                             float global, float rcp6, bool plain, const Again& again) {
  if (kFormat == RowFormat::kBf16 || out.y) write_bf16(out, v, valid, vector);
  if constexpr (kFormat == RowFormat::kBf16) return;
  const Vector16 vectors[1] = {vector};
  uint4 codes[1];
  uint32_t sf[1];
  encode_vectors<kFormat>(vectors, global, rcp6, plain, codes, sf, [&](int) { return again(); });
  if (!valid) return;
  write_codes<kFormat>(out, v, codes[0]);
  if constexpr (kFormat == RowFormat::kFp8) {
    if (v % 8 == 0) out.sf[v / 8] = static_cast<uint8_t>(sf[0]);
  } else {
    if (out.sf_layout == SfLayout::kLinear) {
      out.sf[v] = static_cast<uint8_t>(sf[0]);
    } else {
      const int64_t at = sf_position_128x4(shape, row, vec);
      out.sf[at] = static_cast<uint8_t>(sf[0]);
      if (vec + 1 == shape.vecs_per_row)
        for (uint32_t pad = 1; (vec + pad) % 4 != 0; ++pad) out.sf[at + pad] = 0;
    }
  }
}

template <RowFormat kFormat>
__device__ __forceinline__ void write_vector(const QuantizedRows& out, const QuantizeShape& shape, int64_t v,
                                             uint32_t row, uint32_t vec, bool valid, const Vector16& vector,
                                             float global, float rcp6, bool plain) {
  write_vector<kFormat>(out, shape, v, row, vec, valid, vector, global, rcp6, plain, [&] { return vector; });
}

// Zeroes the scale rows that pad each 128x4 matrix.
__device__ __forceinline__ void zero_sf_padding(const QuantizedRows& out, const QuantizeShape& shape, uint32_t thread,
                                                uint32_t num_threads) {
  if (out.format != RowFormat::kNvfp4 || out.sf_layout != SfLayout::k128x4) return;
  const uint32_t pad_rows = (128 - shape.sf_matrix_rows % 128) % 128, per_matrix = pad_rows * shape.quads_per_row;
  if (pad_rows == 0) return;
  for (uint32_t i = thread; i < per_matrix * (shape.num_rows / shape.sf_matrix_rows); i += num_threads) {
    const uint32_t matrix = i / per_matrix, m = shape.sf_matrix_rows + i % per_matrix / shape.quads_per_row,
                   quad = i % shape.quads_per_row;
    const int64_t at = matrix * shape.sf_matrix_bytes + ((m / 128) * shape.quads_per_row + quad) * 512 + (m % 32) * 16 +
                       (m % 128) / 32 * 4;
    *reinterpret_cast<uint32_t*>(out.sf + at) = 0;
  }
}

// ---- quantize_stream ----

// A CTA takes vecs_per_thread * 256 consecutive vectors; a thread loads its next vector before it works on the current one.
// kFlat: the whole tensor is one row (contiguous, linear scales, nothing per row), which spares the division.
template <class Source, RowFormat kFormat, bool kFlat>
__global__ void __launch_bounds__(kStreamThreads, kFlat ? 4 : Source::kTraits.stream_ctas)
    quantize_stream(const Source source, const QuantizedRows out, const QuantizeShape shape, uint32_t vecs_per_thread) {
  const uint32_t ordered = source.order(threadIdx.x);
  uint32_t first = blockIdx.x * vecs_per_thread * kStreamThreads;
  const auto row_of = [&](uint32_t v) { return kFlat ? 0u : shape.by_vecs_per_row.quotient(v); };
  const auto vec_of = [&](uint32_t v, uint32_t row) { return kFlat ? v : v - row * shape.vecs_per_row; };
  uint32_t row = row_of(first + ordered), vec = vec_of(first + ordered, row);
  // L2 is where all writes meet: a prefetch into it is no read and may run ahead of the kernel that still writes these rows.
  if (first + ordered < shape.num_vecs) source.prefetch(row, vec);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  float global = out.global_mode == GlobalMode::kGiven ? out.global[0] : 1.0f;
  float rcp6 = nvfp4_rcp6({global});
  bool plain = nvfp4_global_is_plain(global);
  typename Source::Raw raw{}, next{};
  float factor = 1.0f, next_factor = 1.0f;
  if (first + ordered < shape.num_vecs) raw = source.load(row, vec), factor = source.row_factor(row);
#pragma unroll 1
  for (uint32_t i = 0; i < vecs_per_thread; ++i, first += kStreamThreads) {
    // Whole warps leave together. NVFP4: after the loads, because the compiler moves loads behind arithmetic unless a branch keeps them
    // in front; the shorter arithmetic of the other results is better off without.
    constexpr bool kLoadsFirst = kFormat == RowFormat::kNvfp4;
    const bool leaves = first + threadIdx.x / 32 * 32 >= shape.num_vecs;
    if (!kLoadsFirst && leaves) break;
    const uint32_t v = first + ordered, next_v = v + kStreamThreads, next_row = row_of(next_v),
                   next_vec = vec_of(next_v, next_row);
    if (i + 1 < vecs_per_thread && next_v < shape.num_vecs)
      next = source.load(next_row, next_vec), next_factor = source.row_factor(next_row);
    if (kLoadsFirst && leaves) break;
    const bool valid = v < shape.num_vecs;
    if constexpr (!kFlat && kFormat == RowFormat::kNvfp4)
      if (out.global_mode == GlobalMode::kPerRow && valid) {
        global = out.global[row];
        rcp6 = nvfp4_rcp6({global});
        plain = nvfp4_global_is_plain(global);
      }
    const Vector16 vector = source.vector(raw, valid ? row : 0, vec, factor);
    if constexpr (kFlat && kFormat == RowFormat::kNvfp4) {
      const Vector16 vectors[1] = {vector};
      uint4 codes[1];
      uint32_t sf[1];
      encode_vectors<kFormat>(vectors, global, rcp6, plain, codes, sf, [&](int) { return vector; });
      if (valid) {
        write_codes<kFormat>(out, v, codes[0]);
        out.sf[v] = static_cast<uint8_t>(sf[0]);
      }
    } else {
      write_vector<kFormat>(out, shape, v, row, vec, valid, vector, global, rcp6, plain);
    }
    raw = next, row = next_row, vec = next_vec, factor = next_factor;
  }
  if constexpr (!kFlat)
    zero_sf_padding(out, shape, blockIdx.x * kStreamThreads + threadIdx.x, gridDim.x * kStreamThreads);
}

// ---- quantize_row ----

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

// One CTA per row; thread t holds vectors t, t + blockDim, ... (kVecs of them) in registers.
template <class Source, int kVecs>
__global__ void __launch_bounds__(kRowThreadsMax)
    quantize_row(const Source source, const QuantizedRows out, const QuantizeShape shape, const RowNorm norm) {
  __shared__ double sum_scratch[kRowThreadsMax / 32];
  __shared__ float max_scratch[kRowThreadsMax / 32];
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const uint32_t row = blockIdx.x;
  const float row_factor = source.row_factor(row);
  typename Source::Raw raw[kVecs] = {};
#pragma unroll
  for (int i = 0; i < kVecs; ++i)
    if (threadIdx.x + i * blockDim.x < shape.vecs_per_row) raw[i] = source.load(row, threadIdx.x + i * blockDim.x);
  Vector16 v[kVecs] = {};
#pragma unroll
  for (int i = 0; i < kVecs; ++i)
    if (threadIdx.x + i * blockDim.x < shape.vecs_per_row)
      v[i] = source.vector(raw[i], row, threadIdx.x + i * blockDim.x, row_factor);

  if (norm.weight) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
#pragma unroll
      for (int j = 0; j < 16; ++j) sum = __fma_rn(static_cast<double>(v[i].x[j]), static_cast<double>(v[i].x[j]), sum);
    const float factor = norm_factor(block_sum(sum, sum_scratch), shape.vecs_per_row, norm.eps);
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
      if (threadIdx.x + i * blockDim.x < shape.vecs_per_row)
        v[i] = normalized(v[i], norm.weight, threadIdx.x + i * blockDim.x, factor);
  }

  float global = 1.0f;
  if (out.global_mode == GlobalMode::kGiven) global = out.global[0];
  if (out.global_mode == GlobalMode::kPerRow) global = out.global[row];
  if (out.global_mode == GlobalMode::kComputeRow) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) largest = fmaxf(largest, amax_of_numbers(v[i]));
    global = nvfp4_global_scale(block_max(largest, max_scratch)).value;
    if (threadIdx.x == 0) out.row_global[row] = global;
  }
  const float rcp6 = nvfp4_rcp6({global});
  const bool plain = nvfp4_global_is_plain(global);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint32_t vec = threadIdx.x + i * blockDim.x;
    if (vec - threadIdx.x % 32 >= shape.vecs_per_row) break;
    const bool valid = vec < shape.vecs_per_row;
    const int64_t at = int64_t{row} * shape.vecs_per_row + vec;
    if (out.format == RowFormat::kBf16)
      write_vector<RowFormat::kBf16>(out, shape, at, row, vec, valid, v[i], global, rcp6, plain);
    if (out.format == RowFormat::kNvfp4)
      write_vector<RowFormat::kNvfp4>(out, shape, at, row, vec, valid, v[i], global, rcp6, plain);
    if (out.format == RowFormat::kFp8)
      write_vector<RowFormat::kFp8>(out, shape, at, row, vec, valid, v[i], global, rcp6, plain);
  }
  zero_sf_padding(out, shape, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}

}  // namespace dsv4
