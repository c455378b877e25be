// The MoE layer from separate operations, each a launch of its own: route, quantise, gather, GEMM, SwiGLU and quantise, GEMM,
// combine. Weights are decoded to BF16 in global memory first (e2m1 * sf is exact in BF16).
//
// The GEMM is plain but for one thing: it multiplies with the matrix instruction of the fused tiled kernel (wgmma m64nNk16, or
// mma.sync m16n8k16 for an expert whose tiles are tiny) in its order (blocks of 64 columns, inside a block the column order of
// moe_layout.h), so that its sums are the fused kernel's bit for bit and the quantised h can be compared as bytes. N does not
// matter: a sum sees its own row and column only.
#pragma once

#include "gpu/context.h"
#include "gpu/moe_case.cuh"
#include "gpu/ptx/sync.cuh"
#include "gpu/sm90/spin.cuh"
#include "gpu/sm90/wgmma_rs.cuh"
#include "ops/moe/moe_layout.h"
#include "ops/quantize/quantize_gpu.h"

namespace dsv4::testing {

// One CTA, a thread per expert. Rows of one expert stand together in slot order. row_slot past the last row: -1.
__global__ inline void unfused_route(const int32_t* topk_idx, int num_slots, int num_experts, int32_t* first_row,
                                     int32_t* row_slot) {
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int count = 0;
    for (int i = 0; i < num_slots; ++i) count += topk_idx[i] == e;
    first_row[e + 1] = count;
  }
  for (int i = threadIdx.x; i < num_slots; i += blockDim.x) row_slot[i] = -1;
  __syncthreads();
  if (threadIdx.x == 0) {
    first_row[0] = 0;
    for (int e = 0; e < num_experts; ++e) first_row[e + 1] += first_row[e];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int row = first_row[e];
    for (int i = 0; i < num_slots; ++i)
      if (topk_idx[i] == e) row_slot[row++] = i;
  }
}
// What a row of the sorted order inherits: its token, routing weight, and the global of its token. blockIdx.x * 256 + thread: row.
__global__ inline void unfused_rows(const int32_t* row_slot, int num_rows, int num_topk, const float* rho,
                                    const float* token_global, int32_t* row_token, float* row_rho, float* row_global) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= num_rows) return;
  const int slot = row_slot[row];
  row_token[row] = slot < 0 ? -1 : slot / num_topk;
  row_rho[row] = slot < 0 ? 0.0f : rho[slot];
  row_global[row] = slot < 0 || !token_global ? 1.0f : token_global[slot / num_topk];
}
__global__ inline void unfused_gather(const bf16* x, const int32_t* row_token, int cols, bf16* out) {
  const int64_t row = blockIdx.x, token = row_token[row];
  for (int c = threadIdx.x; c < cols; c += blockDim.x) out[row * cols + c] = token < 0 ? bf16{0} : x[token * cols + c];
}

__device__ inline void unfused_mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// y[row, :] = bf16(w x * (alpha[e] * row_global[row])) for the rows of expert e = blockIdx.z. 128 threads: 64 weight rows
// (blockIdx.x) times tiles of 64 token rows (blockIdx.y, striding). row_target: where a row goes, or nullptr: to itself.
__global__ inline void __launch_bounds__(128)
    unfused_gemm(const bf16* w, const float* alpha, const bf16* x, const float* row_global, const int32_t* first_row,
                 const int32_t* row_target, int rows, int cols, bf16* y) {
  __shared__ alignas(1024) uint8_t operand[64 * 128];
  const int e = blockIdx.z, thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  const int begin = first_row[e], end = first_row[e + 1];
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(operand));
  const int weight_row = blockIdx.x * 64 + warp * 16 + g;
  const uint32_t* low = reinterpret_cast<const uint32_t*>(w + (int64_t(e) * rows + weight_row) * cols);
  const uint32_t* high = low + int64_t(8) * (cols / 2);
  const bool tiny = sm90::moe_tile_list(sm90::moe_tile_step(end - begin)) == sm90::TileList::kTiny;
  for (int first = begin + blockIdx.y * 64; first < end; first += gridDim.y * 64) {
    float sum[32] = {};
    if (tiny) {
      for (int k = 0; k < cols; k += 64)
        for (int step = 0; step < 4; ++step) {
          const int at = k / 2 + 8 * t + 2 * step;
          const uint32_t a[4] = {low[at], high[at], low[at + 1], high[at + 1]};
#pragma unroll
          for (int tile = 0; tile < 8; ++tile) {
            const uint32_t* row =
                reinterpret_cast<const uint32_t*>(x + int64_t(min(first + tile * 8 + g, end - 1)) * cols) + at;
            unfused_mma(&sum[tile * 4], a, row[0], row[1]);
          }
        }
    }
    for (int k = 0; !tiny && k < cols; k += 64) {
      __syncthreads();
      for (int i = thread; i < 64 * 8; i += 128) {
        const int r = i / 8, chunk = i % 8;
        uint32_t v[4] = {};
        if (first + r < end)
          for (int j = 0; j < 4; ++j)
            v[j] = reinterpret_cast<const uint32_t*>(x + int64_t(first + r) * cols + k)[8 * j + chunk];
        *reinterpret_cast<uint4*>(operand + r * 128 + ((chunk ^ (r & 7)) << 4)) = make_uint4(v[0], v[1], v[2], v[3]);
      }
      sm90::fence_proxy_async_all();
      __syncthreads();
      sm90::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int at = k / 2 + 8 * t + 2 * step;
        const uint32_t a[4] = {low[at], high[at], low[at + 1], high[at + 1]};
        const uint64_t descriptor =
            (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | ((address + step * 32) >> 4);
        sm90::Wgmma<64>::mma(sum, a, descriptor);
      }
      sm90::wgmma_commit();
      sm90::wgmma_wait<0>();
    }
#pragma unroll
    for (int tile = 0; tile < 8; ++tile)
      for (int i = 0; i < 4; ++i) {
        const int row = first + tile * 8 + 2 * t + (i & 1);
        if (row >= end) continue;
        const int64_t target = row_target ? row_target[row] : row;
        y[target * rows + weight_row + (i >> 1) * 8] =
            encode_bf16(sum[tile * 4 + i] * (alpha[e * 3] * row_global[row]));
      }
  }
}

// A CTA per token: slots in order of expert id, then the shared part.
__global__ inline void unfused_combine(const bf16* slot_y, const int32_t* topk_idx, int num_topk, int num_experts,
                                       int cols, const bf16* shared_y, bf16* y) {
  const int64_t token = blockIdx.x;
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    float sum = 0.0f;
    for (int e = 0; e < num_experts; ++e)
      for (int k = 0; k < num_topk; ++k)
        if (topk_idx[token * num_topk + k] == e) sum += decode_bf16(slot_y[(token * num_topk + k) * cols + c]);
    if (shared_y) sum += decode_bf16(shared_y[token * cols + c]);
    y[token * cols + c] = encode_bf16(sum);
  }
}

struct UnfusedResult {
  DeviceBuffer first_row, row_slot;      // [num_experts + 1], [slots]
  DeviceBuffer h_codes, h_sf, h_global;  // a4: rows of h as quantised, in row order
  DeviceBuffer h;                        // [slots, inter] what fc2 reads, without the global
  DeviceBuffer slot_y, y;
};

inline DeviceBuffer decode_weights(const uint8_t* codes, const uint8_t* sf, int64_t rows, int64_t cols,
                                   const GpuContext& context) {
  DeviceBuffer out(rows * cols * 2);
  DequantizeArgs args{};
  args.codes = codes, args.sf = sf, args.y = out.data(), args.global_mode = GlobalMode::kOne;
  args.num_rows = args.num_out = rows, args.cols = cols;
  dequantize_rows(args, context);
  return out;
}

inline UnfusedResult run_unfused(const ExpertSet& experts, const Layer& l, ActFormat act, float limit,
                                 cudaStream_t stream) {
  const CaseShape& s = experts.shape;
  const LinearExperts w = experts.linear();
  const bool a4 = act == ActFormat::kNvfp4;
  const int slots = static_cast<int>(l.tokens) * s.topk;
  const GpuContext context{stream};
  UnfusedResult r;
  r.first_row = DeviceBuffer((s.experts + 1) * 4), r.row_slot = DeviceBuffer(slots * 4);
  r.h = DeviceBuffer(int64_t(slots) * s.inter * 2), r.slot_y = DeviceBuffer(int64_t(slots) * s.hidden * 2),
  r.y = DeviceBuffer(l.tokens * s.hidden * 2);
  unfused_route<<<1, 1024, 0, stream>>>(l.idx.as<int32_t>(), slots, s.experts, r.first_row.as<int32_t>(),
                                        r.row_slot.as<int32_t>());

  // x: quantised per token (a4), then one row per slot
  DeviceBuffer x_codes(l.tokens * s.hidden / 2), x_sf(l.tokens * s.hidden / 16), x_global(l.tokens * 4);
  if (a4) {
    QuantizeArgs q{};
    q.x = l.x.data(), q.num_rows = l.tokens, q.cols = s.hidden, q.x_stride = s.hidden;
    q.out.global_mode = GlobalMode::kComputeRow, q.out.codes = x_codes.as<uint8_t>(), q.out.sf = x_sf.as<uint8_t>(),
    q.out.row_global = x_global.as<float>();
    quantize_rows(q, context);
  }
  DeviceBuffer row_token(slots * 4), row_rho(slots * 4), row_global(slots * 4), x_rows(int64_t(slots) * s.hidden * 2);
  unfused_rows<<<(slots + 255) / 256, 256, 0, stream>>>(r.row_slot.as<int32_t>(), slots, s.topk, l.rho.as<float>(),
                                                        a4 ? x_global.as<float>() : nullptr, row_token.as<int32_t>(),
                                                        row_rho.as<float>(), row_global.as<float>());
  DeviceBuffer bad(4);
  gpu::fill(bad.data(), 0, 4, stream);
  if (a4) {
    DequantizeArgs d{};
    d.codes = x_codes.as<uint8_t>(), d.sf = x_sf.as<uint8_t>(), d.rows = row_token.as<int32_t>(),
    d.bad_rows = bad.as<int32_t>(), d.y = x_rows.data();
    d.global_mode = GlobalMode::kOne, d.num_rows = l.tokens, d.num_out = slots, d.cols = s.hidden;
    dequantize_rows(d, context);
  } else {
    unfused_gather<<<slots, 256, 0, stream>>>(l.x.as<bf16>(), row_token.as<int32_t>(), s.hidden, x_rows.as<bf16>());
  }

  const int64_t inter_rows = int64_t(s.experts) * s.inter, hidden_rows = int64_t(s.experts) * s.hidden;
  const DeviceBuffer w1 = decode_weights(w.w1, w.sf1, inter_rows, s.hidden, context),
                     w3 = decode_weights(w.w3, w.sf3, inter_rows, s.hidden, context),
                     w2 = decode_weights(w.w2, w.sf2, hidden_rows, s.inter, context);
  DeviceBuffer gate(r.h.bytes()), up(r.h.bytes());
  gpu::fill(gate.data(), 0, gate.bytes(), stream);
  gpu::fill(up.data(), 0, up.bytes(), stream);
  const auto gemm = [&](const DeviceBuffer& weights, int which, const DeviceBuffer& rows, const DeviceBuffer& scale,
                        const int32_t* target, int out_cols, int in_cols, const DeviceBuffer& out) {
    unfused_gemm<<<dim3(out_cols / 64, 8, s.experts), 128, 0, stream>>>(
        weights.as<bf16>(), w.globals + which, rows.as<bf16>(), scale.as<float>(), r.first_row.as<int32_t>(), target,
        out_cols, in_cols, out.as<bf16>());
  };
  gemm(w1, 0, x_rows, row_global, nullptr, s.inter, s.hidden, gate);
  gemm(w3, 1, x_rows, row_global, nullptr, s.inter, s.hidden, up);

  SwigluQuantizeArgs q{};
  q.gate = gate.as<bf16>(), q.up = up.as<bf16>(), q.rho = row_rho.as<float>(), q.limit = limit;
  q.num_rows = slots, q.cols = s.inter, q.stride = s.inter;
  r.h_global = DeviceBuffer(slots * 4);
  if (a4) {
    r.h_codes = DeviceBuffer(int64_t(slots) * s.inter / 2), r.h_sf = DeviceBuffer(int64_t(slots) * s.inter / 16);
    q.out.global_mode = GlobalMode::kComputeRow, q.out.codes = r.h_codes.as<uint8_t>(), q.out.sf = r.h_sf.as<uint8_t>();
    q.out.row_global = r.h_global.as<float>();
    swiglu_quantize(q, context);
    DequantizeArgs d{};
    d.codes = r.h_codes.as<uint8_t>(), d.sf = r.h_sf.as<uint8_t>(), d.y = r.h.data(), d.global_mode = GlobalMode::kOne;
    d.num_rows = d.num_out = slots, d.cols = s.inter;
    dequantize_rows(d, context);
  } else {
    q.out.format = RowFormat::kBf16, q.out.y = r.h.as<bf16>();
    swiglu_quantize(q, context);
    const std::vector<float> ones(static_cast<size_t>(slots), 1.0f);
    gpu::copy_to_device(r.h_global.data(), ones.data(), slots * 4, stream);
  }
  gemm(w2, 2, r.h, r.h_global, r.row_slot.as<int32_t>(), s.hidden, s.inter, r.slot_y);
  unfused_combine<<<unsigned(l.tokens), 256, 0, stream>>>(r.slot_y.as<bf16>(), l.idx.as<int32_t>(), s.topk, s.experts,
                                                          s.hidden, l.shared_y.as<bf16>(), r.y.as<bf16>());
  DSV4_CUDA(cudaGetLastError());
  DSV4_CUDA(cudaStreamSynchronize(stream));
  return r;
}

}  // namespace dsv4::testing
