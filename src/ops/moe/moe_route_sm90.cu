// Around the tiled tier: routing (sort slots by expert), gather (token rows into the operand layout), combine.
#include "codec/nvfp4.h"
#include "gpu/launch.h"
#include "gpu/ptx/sync.cuh"
#include "ops/moe/moe_layout.h"
#include "ops/moe/moe_sm90.h"

namespace dsv4::sm90 {
namespace {

constexpr int kRouteThreads = 1024;
constexpr int kSlice = 128;  // rows a tile can have, rounded up: how warps walk rows without searching their tile

// Sums over the threads before this one, and over all: rows, and tiles of each list.
struct RouteSums {
  int v[1 + kTileLists];
};
__device__ RouteSums exclusive_sum(const RouteSums& own, RouteSums* warp_sums, RouteSums& all) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RouteSums sum = own, before{};
  all = {};
#pragma unroll
  for (int i = 0; i < 1 + kTileLists; ++i)
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum.v[i], d);
      if (lane >= d) sum.v[i] += other;
    }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < kRouteThreads / 32; ++w) {
    if (w == warp) before = all;
#pragma unroll
    for (int i = 0; i < 1 + kTileLists; ++i) all.v[i] += warp_sums[w].v[i];
  }
#pragma unroll
  for (int i = 0; i < 1 + kTileLists; ++i) before.v[i] += sum.v[i] - own.v[i];
  return before;
}

constexpr int kRouteCluster = 8;
constexpr int64_t kRouteClusterSlots = 4096;  // from here on the exchange between CTAs costs less than it saves

// A cluster: each CTA counts its run of slots by expert (the count before is a slot's rank), all add up the counts, give experts
// rows and tiles, then slots their rows. 38 us for 24,576 slots in one CTA.
__global__ void __launch_bounds__(kRouteThreads, 1)
    moe_route_kernel(MoeShape shape, const int32_t* topk_idx, int num_slots, MoeRouting routing) {
  __shared__ int count[kMoeMaxExperts], first_row[kMoeMaxExperts];
  __shared__ RouteSums warp_sums[kRouteThreads / 32];
  constexpr int kBatch = 8;  // loads in flight
  const int num_experts = shape.num_experts, self = threadIdx.x;
  const int ctas = gridDim.x, cta = blockIdx.x;  // the grid is the cluster
  const int run = (num_slots + ctas - 1) / ctas, begin = cta * run, end = min(num_slots, begin + run);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (self < num_experts) count[self] = 0;
  __syncthreads();
  for (int base = begin + self; base < end; base += kBatch * kRouteThreads) {
    int expert[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = base + b * kRouteThreads;
      const int e = i < end ? topk_idx[i] : -1;
      expert[b] = e < num_experts ? e : -1;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = base + b * kRouteThreads;
      if (i < end) routing.slot_row[i] = expert[b] >= 0 ? atomicAdd(&count[expert[b]], 1) : -1;
    }
  }
  ptx::cluster_sync();

  int rows = 0, earlier = 0;  // of this thread's expert: in all runs, in the runs before this CTA's
  if (self < num_experts)
    for (int other = 0; other < ctas; ++other) {
      const int n = ctas == 1 ? count[self] : ptx::load_cluster_s32(ptx::map_to_cta(&count[self], other));
      rows += n;
      earlier += other < cta ? n : 0;
    }
  const int step = moe_tile_step(rows), tiles = (rows + step - 1) / step;
  const int list = static_cast<int>(moe_tile_list(step));
  RouteSums own{}, all;
  own.v[0] = (rows + 7) / 8 * 8;
#pragma unroll
  for (int i = 0; i < kTileLists; ++i) own.v[1 + i] = list == i ? tiles : 0;
  const RouteSums before = exclusive_sum(own, warp_sums, all);
  if (self < num_experts) first_row[self] = before.v[0] + earlier;
  if (cta == 0) {
    if (self < num_experts) {
      reinterpret_cast<int2*>(routing.expert_rows)[self] = make_int2(before.v[0], rows);
      int first_tile = list * routing.max_tiles;
#pragma unroll
      for (int i = 0; i < kTileLists; ++i) first_tile += list == i ? before.v[1 + i] : 0;
      for (int j = 0; j < tiles; ++j) {
        const int used = min(step, rows - j * step);
        routing.tiles[first_tile + j] = {self, before.v[0] + j * step, used, (used + 7) / 8 * 8};
        routing.tile_done[first_tile + j] = 0;
      }
    }
    if (self < 4 * kTileLists) routing.ticket[self] = 0;
    if (self == 0) {
#pragma unroll
      for (int i = 0; i < kTileLists; ++i) routing.num_tiles[i] = all.v[1 + i];
    }
  }
  ptx::cluster_arrive();  // done with the others' counts
  __syncthreads();

  for (int base = begin + self; base < end; base += kBatch * kRouteThreads) {
    int expert[kBatch], rank[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = base + b * kRouteThreads;
      rank[b] = i < end ? routing.slot_row[i] : -1;
      expert[b] = i < end ? topk_idx[i] : 0;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (rank[b] < 0) continue;
      const int i = base + b * kRouteThreads, row = first_row[expert[b]] + rank[b];
      routing.slot_row[i] = row;
      routing.row_slot[row] = i;
    }
  }
  ptx::cluster_wait();  // a CTA's counts stay until all have read them
}

// Where row `row` of the token operand begins: its first chunk is the returned offset in 16-byte units for chunk (row & 7), and
// the next block of 64 columns is `stride` on.
struct OperandRow {
  int64_t offset;
  int stride, in_tile;
};
__device__ __forceinline__ OperandRow operand_row(const MoeRouting& routing, int expert, int row, int columns) {
  const int2 span = reinterpret_cast<const int2*>(routing.expert_rows)[expert];
  const int step = moe_tile_step(span.y), tile = (row - span.x) / step, first = span.x + tile * step;
  const int padded = (min(step, span.y - tile * step) + 7) / 8 * 8;
  return {static_cast<int64_t>(first) * (columns / 8) + (row - first) * 8, padded * 8, row - first};
}

// A warp per token and quarter of its columns: x is read once and written to each of its slots. Lane = (block of 64 columns mod 4, chunk).
constexpr int kGatherParts = 4;
__global__ void __launch_bounds__(256) moe_gather_kernel(MoeShape shape, MoeRouting routing, const int32_t* topk_idx,
                                                         const bf16* x, int64_t num_tokens, bf16* x_rows) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, chunk = lane % 8, topk = shape.num_topk;
  const int64_t work = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t token = work / kGatherParts;
  if (token >= num_tokens) return;
  const int part = static_cast<int>(work % kGatherParts), blocks = shape.hidden / kMoeBlockCols;
  const int per_part = (blocks + kGatherParts - 1) / kGatherParts, begin = part * per_part,
            end = min(blocks, begin + per_part);
  int row = -1;  // lane k keeps where slot k goes
  OperandRow place{};
  if (lane < topk) {
    row = routing.slot_row[token * topk + lane];
    if (row >= 0) place = operand_row(routing, topk_idx[token * topk + lane], row, shape.hidden);
  }
  const uint32_t* source = reinterpret_cast<const uint32_t*>(x + token * shape.hidden);
  for (int base = begin; base < end; base += 16) {  // up to four loads of blocks in flight
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int block = base + 4 * j + lane / 8;
      const uint32_t* from = source + block * 32 + chunk;  // columns 16 t + 2 chunk
      if (block < end) v[j] = make_uint4(from[0], from[8], from[16], from[24]);
    }
    for (int k = 0; k < topk; ++k) {
      const int64_t offset = __shfl_sync(0xffffffffu, place.offset, k);
      const int stride = __shfl_sync(0xffffffffu, place.stride, k),
                in_tile = __shfl_sync(0xffffffffu, place.in_tile, k);
      if (__shfl_sync(0xffffffffu, row, k) < 0) continue;
      uint4* target = reinterpret_cast<uint4*>(x_rows) + offset + (chunk ^ (in_tile & 7));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int block = base + 4 * j + lane / 8;
        if (block < end) target[static_cast<int64_t>(block) * stride] = v[j];
      }
    }
  }
}

// One group of 16 quantised by the run-time rule, as bf16 e2m1 * sf in operand order: chunk c of the block holds columns 2 c, 2 c + 1
// of each of its four groups.
__device__ __forceinline__ void quantize_group(const float (&v)[16], const GlobalScale& global, float rcp6,
                                               uint32_t (&out)[8]) {
  const Nvfp4Group q = encode_nvfp4_runtime_group(v, global, rcp6);
  const float sf = decode_ue4m3(q.sf);
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const uint32_t low = __float_as_uint(decode_e2m1(e2m1x2_even(q.codes[c])) * sf) >> 16;
    const uint32_t high = __float_as_uint(decode_e2m1(e2m1x2_odd(q.codes[c])) * sf) & 0xffff0000u;
    out[c] = low | high;
  }
}
__device__ __forceinline__ void load_group(const bf16* from, float (&v)[16]) {
  uint32_t w[8];
  *reinterpret_cast<uint4*>(w) = *reinterpret_cast<const uint4*>(from);
  *reinterpret_cast<uint4*>(w + 4) = *reinterpret_cast<const uint4*>(from + 8);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[2 * i] = __uint_as_float(w[i] << 16), v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
}
__device__ __forceinline__ void load_group(const float* from, float (&v)[16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<float4*>(v + 4 * i) = *reinterpret_cast<const float4*>(from + 4 * i);
}
// amax over the warp of a row.
template <class Source>
__device__ __forceinline__ float row_amax(const Source* row, int groups, int lane) {
  float amax = 0.0f, v[16];
  for (int group = lane; group < groups; group += 32) {
    load_group(row + group * 16, v);
    const float a = group_amax(v, 16);
    amax = a > amax ? a : amax;
  }
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, amax, d);
    amax = other > amax ? other : amax;
  }
  return amax;
}

// A warp per token, a lane per group of 16: quantised once, written to each of its slots.
__global__ void __launch_bounds__(256)
    moe_gather_nvfp4_kernel(MoeShape shape, MoeRouting routing, const int32_t* topk_idx, const bf16* x,
                            int64_t num_tokens, bf16* x_rows, float* x_global) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, topk = shape.num_topk, groups = shape.hidden / 16;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= num_tokens) return;
  const bf16* source = x + token * shape.hidden;
  const GlobalScale global = nvfp4_global_scale(row_amax(source, groups, lane));
  const float rcp6 = nvfp4_rcp6(global);
  for (int base = 0; base < groups; base += 32) {
    const int group = base + lane;
    float v[16];
    uint32_t out[8];
    if (group < groups) {
      load_group(source + group * 16, v);
      quantize_group(v, global, rcp6, out);
    }
    for (int k = 0; k < topk; ++k) {
      const int row = routing.slot_row[token * topk + k];
      if (row < 0) continue;
      const OperandRow place = operand_row(routing, topk_idx[token * topk + k], row, shape.hidden);
      if (base == 0 && lane == 0) x_global[row] = global.value;
      if (group >= groups) continue;
      uint32_t* target = reinterpret_cast<uint32_t*>(reinterpret_cast<uint4*>(x_rows) + place.offset +
                                                     static_cast<int64_t>(group / 4) * place.stride) +
                         group % 4;
#pragma unroll
      for (int c = 0; c < 8; ++c) target[(c ^ (place.in_tile & 7)) * 4] = out[c];
    }
  }
}

// A warp per row of h, a lane per group of 16: the row's amax, then every group quantised by the run-time rule.
__global__ void __launch_bounds__(256)
    moe_requantize_kernel(MoeShape shape, MoeRouting routing, const float* h_wide, bf16* rows, float* globals) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, columns = shape.inter, groups = columns / 16;
  const int warps = gridDim.x * (blockDim.x / 32), self = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int large = routing.num_tiles[0], small = large + routing.num_tiles[1], tiles = small + routing.num_tiles[2];
  for (int work = self; work < tiles * kSlice; work += warps) {
    const int index = work / kSlice, r = work % kSlice;
    const MoeTile tile = routing.tiles[index < large   ? index
                                       : index < small ? routing.max_tiles + index - large
                                                       : 2 * routing.max_tiles + index - small];
    if (r >= tile.rows) continue;
    const float* row = h_wide + static_cast<int64_t>(tile.first_row + r) * columns;
    const GlobalScale global = nvfp4_global_scale(row_amax(row, groups, lane));
    const float rcp6 = nvfp4_rcp6(global);
    if (lane == 0) globals[tile.first_row + r] = global.value;
    uint8_t* target = reinterpret_cast<uint8_t*>(rows) + static_cast<int64_t>(tile.first_row) * columns * 2 + r * 128;
    for (int group = lane; group < groups; group += 32) {
      float v[16];
      uint32_t out[8];
      load_group(row + group * 16, v);
      quantize_group(v, global, rcp6, out);
      uint8_t* block = target + static_cast<int64_t>(group / 4) * tile.padded * 128 + (group % 4) * 4;
#pragma unroll
      for (int c = 0; c < 8; ++c) *reinterpret_cast<uint32_t*>(block + ((c ^ (r & 7)) << 4)) = out[c];
    }
  }
}

// A thread per eight columns of a token: its slots in order of expert id, then the shared expert, rounded once.
__global__ void __launch_bounds__(256)
    moe_combine_kernel(MoeShape shape, const int32_t* topk_idx, const bf16* slot_y, const bf16* shared_y, bf16* y) {
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
  config.cluster = num_tokens * shape.num_topk >= kRouteClusterSlots ? kRouteCluster : 1;
  config.grid = config.cluster;
  config.block = kRouteThreads;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_route_kernel, config, shape, topk_idx, static_cast<int>(num_tokens) * shape.num_topk, routing);
}

void launch_moe_gather(const MoeShape& shape, const MoeRouting& routing, const int32_t* topk_idx, const bf16* x,
                       int64_t num_tokens, bf16* x_rows, cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.grid = static_cast<unsigned>((num_tokens * kGatherParts + 7) / 8);
  config.block = 256;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_gather_kernel, config, shape, routing, topk_idx, x, num_tokens, x_rows);
}

void launch_moe_gather_nvfp4(const MoeShape& shape, const MoeRouting& routing, const int32_t* topk_idx, const bf16* x,
                             int64_t num_tokens, bf16* x_rows, float* x_global, cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.grid = static_cast<unsigned>((num_tokens + 7) / 8);
  config.block = 256;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_gather_nvfp4_kernel, config, shape, routing, topk_idx, x, num_tokens, x_rows, x_global);
}

void launch_moe_requantize(const MoeShape& shape, const MoeRouting& routing, const float* h_wide, bf16* h_rows,
                           float* h_global, cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.grid = 132 * 8;
  config.block = 256;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_requantize_kernel, config, shape, routing, h_wide, h_rows, h_global);
}

void launch_moe_combine(const MoeShape& shape, const int32_t* topk_idx, const bf16* slot_y, const bf16* shared_y,
                        int64_t num_tokens, bf16* y, cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(num_tokens), static_cast<unsigned>((shape.hidden + 2047) / 2048));
  config.block = 256;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_combine_kernel, config, shape, topk_idx, slot_y, shared_y, y);
}

}  // namespace dsv4::sm90
