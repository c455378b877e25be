// Around the tiled tier: routing (sort slots by expert), gather (token rows into the operand layout), combine.
#include <algorithm>

#include "codec/nvfp4.h"
#include "gpu/launch.h"
#include "gpu/ptx/sync.cuh"
#include "ops/moe/moe_layout.h"
#include "ops/moe/moe_sm90.h"

namespace dsv4::sm90 {
namespace {

constexpr int kRouteWarps = 32;
constexpr int kRouteBatches = 8;  // loads in flight per lane
constexpr int kSlice = 128;       // rows a tile can have, rounded up: how warps walk rows without searching their tile

// One CTA. Warp w takes a contiguous run of slots; ranks follow slot order, so the result is deterministic.
__global__ void __launch_bounds__(32 * kRouteWarps, 1)
    moe_route_kernel(MoeShape shape, const int32_t* topk_idx, int num_slots, MoeRouting routing) {
  extern __shared__ int count[];  // [kRouteWarps, num_experts], then per expert: first row, first tile
  const int num_experts = shape.num_experts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int* first_row = count + kRouteWarps * num_experts;
  int* first_tile = first_row + num_experts;
  int* total = first_tile + num_experts;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  for (int i = threadIdx.x; i < kRouteWarps * num_experts; i += blockDim.x) count[i] = 0;
  __syncthreads();

  const int segment = (num_slots + 32 * kRouteWarps - 1) / (32 * kRouteWarps) * 32;
  const int begin = warp * segment, end = min(num_slots, begin + segment);
  int* mine = count + warp * num_experts;
  const auto for_each_batch = [&](const auto& body) {  // body(slot, expert or -1)
    for (int base = begin; base < end; base += 32 * kRouteBatches) {
      int expert[kRouteBatches];
#pragma unroll
      for (int b = 0; b < kRouteBatches; ++b) {
        const int i = base + b * 32 + lane;
        const int e = i < end ? topk_idx[i] : -1;
        expert[b] = e < num_experts ? e : -1;
      }
#pragma unroll
      for (int b = 0; b < kRouteBatches; ++b) body(base + b * 32 + lane, expert[b]);
    }
  };
  for_each_batch([&](int, int e) {
    const uint32_t peers = __match_any_sync(0xffffffffu, e);
    if (e >= 0 && __popc(peers & ((1u << lane) - 1)) == 0) mine[e] += __popc(peers);
    __syncwarp();
  });
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {  // counts -> offsets of each warp inside the expert
    int sum = 0;
    for (int w = 0; w < kRouteWarps; ++w) {
      const int n = count[w * num_experts + e];
      count[w * num_experts + e] = sum;
      sum += n;
    }
    total[e] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    int rows = 0, tiles = 0;
    for (int base = 0; base < num_experts; base += 32) {
      const int e = base + lane, n = e < num_experts ? total[e] : 0;
      const int padded = (n + 7) / 8 * 8, cut = (n + kTileRows - 1) / kTileRows;
      int row_sum = padded, tile_sum = cut;
      for (int d = 1; d < 32; d *= 2) {
        const int other_rows = __shfl_up_sync(0xffffffffu, row_sum, d), other_tiles = __shfl_up_sync(0xffffffffu, tile_sum, d);
        if (lane >= d) row_sum += other_rows, tile_sum += other_tiles;
      }
      if (e < num_experts) {
        first_row[e] = rows + row_sum - padded;
        first_tile[e] = tiles + tile_sum - cut;
      }
      rows += __shfl_sync(0xffffffffu, row_sum, 31);
      tiles += __shfl_sync(0xffffffffu, tile_sum, 31);
    }
    if (lane == 0) {
      *routing.num_tiles = tiles;
      routing.ticket[0] = 0;
      routing.ticket[1] = 0;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x)
    for (int j = 0; j * kTileRows < total[e]; ++j) {
      const int rows = min(kTileRows, total[e] - j * kTileRows);
      routing.tiles[first_tile[e] + j] = {e, first_row[e] + j * kTileRows, rows, (rows + 7) / 8 * 8};
      routing.tile_done[first_tile[e] + j] = 0;
    }
  for_each_batch([&](int i, int e) {
    const uint32_t peers = __match_any_sync(0xffffffffu, e);
    const int before = __popc(peers & ((1u << lane) - 1));
    if (e >= 0) {
      const int row = first_row[e] + mine[e] + before;
      routing.slot_row[i] = row;
      routing.row_slot[row] = i;
    } else if (i < end) {
      routing.slot_row[i] = -1;
    }
    __syncwarp();
    if (e >= 0 && before == 0) mine[e] += __popc(peers);
    __syncwarp();
  });
}

// A warp per slot: x row -> its place in the token operand. Lane = (block of 64 columns mod 4, chunk).
__global__ void __launch_bounds__(256) moe_gather_kernel(MoeShape shape, MoeRouting routing,
                                                         const bf16* x, bf16* x_rows) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, chunk = lane % 8;
  const int tiles = *routing.num_tiles;
  const int blocks = shape.hidden / kMoeBlockCols;
  // Warps walk tiles, so a row knows its tile without a search.
  const int warps = gridDim.x * (blockDim.x / 32), self = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  for (int work = self; work < tiles * kSlice; work += warps) {
    const MoeTile tile = routing.tiles[work / kSlice];
    const int r = work % kSlice;
    if (r >= tile.rows) continue;
    const int token = routing.row_slot[tile.first_row + r] / shape.num_topk;
    const uint32_t* source = reinterpret_cast<const uint32_t*>(x + static_cast<int64_t>(token) * shape.hidden);
    uint4* target = reinterpret_cast<uint4*>(x_rows + static_cast<int64_t>(tile.first_row) * shape.hidden) + r * 8 + (chunk ^ (r & 7));
#pragma unroll 4
    for (int block = lane / 8; block < blocks; block += 4) {
      const uint32_t* from = source + block * 32 + chunk;  // columns 16 t + 2 chunk
      target[block * tile.padded * 8] = make_uint4(from[0], from[8], from[16], from[24]);
    }
  }
}

// A warp per row, a lane per group of 16: the row's amax, then every group quantised by the run-time rule.
template <class Source>  // bf16: x by token; float: h by padded row
__global__ void __launch_bounds__(256) moe_quantize_rows_kernel(MoeShape shape, int columns, MoeRouting routing, const Source* source,
                                                                bf16* rows, float* globals) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, tiles = *routing.num_tiles, groups = columns / 16;
  const int warps = gridDim.x * (blockDim.x / 32), self = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  for (int work = self; work < tiles * kSlice; work += warps) {
    const MoeTile tile = routing.tiles[work / kSlice];
    const int r = work % kSlice;
    if (r >= tile.rows) continue;
    int64_t from = tile.first_row + r;
    if constexpr (sizeof(Source) == sizeof(bf16)) from = routing.row_slot[from] / shape.num_topk;
    const Source* row = source + from * columns;
    const auto load_group = [&](int group, float (&v)[16]) {
      if constexpr (sizeof(Source) == sizeof(bf16)) {
        uint32_t w[8];
        *reinterpret_cast<uint4*>(w) = *reinterpret_cast<const uint4*>(row + group * 16);
        *reinterpret_cast<uint4*>(w + 4) = *reinterpret_cast<const uint4*>(row + group * 16 + 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[2 * i] = __uint_as_float(w[i] << 16), v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) *reinterpret_cast<float4*>(v + 4 * i) = *reinterpret_cast<const float4*>(row + group * 16 + 4 * i);
      }
    };
    float amax = 0.0f, v[16];
    for (int group = lane; group < groups; group += 32) {
      load_group(group, v);
      const float a = group_amax(v, 16);
      amax = a > amax ? a : amax;
    }
    for (int d = 16; d > 0; d /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, amax, d);
      amax = other > amax ? other : amax;
    }
    const GlobalScale global = nvfp4_global_scale(amax);
    const float rcp6 = nvfp4_rcp6(global);
    if (lane == 0) globals[tile.first_row + r] = global.value;
    uint8_t* target = reinterpret_cast<uint8_t*>(rows) + static_cast<int64_t>(tile.first_row) * columns * 2 + r * 128;
    for (int group = lane; group < groups; group += 32) {
      load_group(group, v);
      const Nvfp4Group q = encode_nvfp4_runtime_group(v, global, rcp6);
      const float sf = decode_ue4m3(q.sf);
      uint8_t* block = target + static_cast<int64_t>(group / 4) * tile.padded * 128 + (group % 4) * 4;
#pragma unroll
      for (int c = 0; c < 8; ++c) {  // chunk c holds columns 2 c, 2 c + 1 of each of the block's four groups
        const uint32_t low = __float_as_uint(decode_e2m1(e2m1x2_even(q.codes[c])) * sf) >> 16;
        const uint32_t high = __float_as_uint(decode_e2m1(e2m1x2_odd(q.codes[c])) * sf) & 0xffff0000u;
        *reinterpret_cast<uint32_t*>(block + ((c ^ (r & 7)) << 4)) = low | high;
      }
    }
  }
}

// A thread per eight columns of a token: its slots in order of expert id, then the shared expert, rounded once.
__global__ void __launch_bounds__(256) moe_combine_kernel(MoeShape shape, const int32_t* topk_idx, const bf16* slot_y,
                                                          const bf16* shared_y, bf16* y) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  const int64_t token = blockIdx.x;
  __shared__ int order[32], used;
  if (threadIdx.x < 32) {
    const int k = threadIdx.x;
    const int e = k < shape.num_topk ? topk_idx[token * shape.num_topk + k] : -1;
    const bool valid = e >= 0 && e < shape.num_experts;
    int place = 0;
    for (int j = 0; j < shape.num_topk; ++j) {
      const int other = __shfl_sync(0xffffffffu, valid ? e : -1, j);
      place += other >= 0 && (other < e || (other == e && j < k));
    }
    if (valid) order[place] = k;
    const uint32_t mask = __ballot_sync(0xffffffffu, valid);
    if (k == 0) used = __popc(mask);
  }
  __syncthreads();
  if (column >= shape.hidden) return;
  float sum[8] = {};
  const auto add = [&](const uint4& v) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += __uint_as_float(w[i] << 16);
      sum[2 * i + 1] += __uint_as_float(w[i] & 0xffff0000u);
    }
  };
#pragma unroll 6
  for (int j = 0; j < used; ++j)
    add(*reinterpret_cast<const uint4*>(slot_y + (token * shape.num_topk + order[j]) * shape.hidden + column));
  if (shared_y) add(*reinterpret_cast<const uint4*>(shared_y + token * shape.hidden + column));
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = encode_bf16(sum[2 * i]).bits | uint32_t(encode_bf16(sum[2 * i + 1]).bits) << 16;
  *reinterpret_cast<uint4*>(y + token * shape.hidden + column) = make_uint4(out[0], out[1], out[2], out[3]);
}

}  // namespace

void launch_moe_route(const MoeShape& shape, const int32_t* topk_idx, int64_t num_tokens, const MoeRouting& routing,
                      cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.grid = 1;
  config.block = 32 * kRouteWarps;
  config.smem_bytes = (kRouteWarps + 3) * shape.num_experts * static_cast<int>(sizeof(int));
  config.stream = stream;
  config.dependent = true;
  gpu::allow_smem(moe_route_kernel, config.smem_bytes);
  gpu::launch(moe_route_kernel, config, shape, topk_idx, static_cast<int>(num_tokens) * shape.num_topk, routing);
}

void launch_moe_gather(const MoeShape& shape, const MoeRouting& routing, const bf16* x, int64_t num_tokens, bf16* x_rows,
                       cudaStream_t stream) {
  const int64_t slots = num_tokens * shape.num_topk;
  gpu::LaunchConfig config;
  config.grid = static_cast<unsigned>(std::min<int64_t>((slots + 7) / 8, 132 * 8));
  config.block = 256;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_gather_kernel, config, shape, routing, x, x_rows);
}

void launch_moe_gather_nvfp4(const MoeShape& shape, const MoeRouting& routing, const bf16* x, bf16* x_rows, float* x_global,
                             cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.grid = 132 * 8;
  config.block = 256;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_quantize_rows_kernel<bf16>, config, shape, shape.hidden, routing, x, x_rows, x_global);
}

void launch_moe_requantize(const MoeShape& shape, const MoeRouting& routing, const float* h_wide, bf16* h_rows, float* h_global,
                           cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.grid = 132 * 8;
  config.block = 256;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_quantize_rows_kernel<float>, config, shape, shape.inter, routing, h_wide, h_rows, h_global);
}

void launch_moe_combine(const MoeShape& shape, const int32_t* topk_idx, const bf16* slot_y, const bf16* shared_y, int64_t num_tokens,
                        bf16* y, cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(num_tokens), static_cast<unsigned>((shape.hidden + 2047) / 2048));
  config.block = 256;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_combine_kernel, config, shape, topk_idx, slot_y, shared_y, y);
}

}  // namespace dsv4::sm90
