// Packing of expert weights and its check. A warpgroup of threads per 64x64 block, in the order the kernels read.
#include <vector>

#include "codec/e4m3.h"
#include "gpu/buffer.h"
#include "gpu/l2_sides.h"
#include "gpu/launch.h"
#include "ops/moe/moe_decode_sm90.cuh"
#include "ops/moe/moe_pack_sm90.h"

namespace dsv4::sm90 {
namespace {

struct PackArgs {
  MoeLinearMatrix gate, up, down;
  int hidden, inter;
  uint8_t* fc1;
  uint8_t* fc2;
  const uint16_t* sides1;  // of this expert, or nullptr
  const uint16_t* sides2;
  float* alpha;
  unsigned long long* mismatches;
};

// The matrix and row behind row `r` (0..15) of a warp.
struct SourceRow {
  const uint8_t* codes;
  const uint8_t* sf;
};
__device__ SourceRow source_row(const PackArgs& args, bool is_fc2, int strip, int warp, int r) {
  const MoeLinearMatrix& m = is_fc2 ? args.down : (r < 8 ? args.gate : args.up);
  const int64_t row = is_fc2 ? moe_fc2_row(strip, warp, r) : moe_fc1_row(strip, warp, r & 7);
  const int64_t cols = is_fc2 ? args.inter : args.hidden;
  return {m.codes + row * (cols / 2), m.sf + row * (cols / 16)};
}

// blockIdx.x: blocks of fc1 as stored, with padding, then blocks of fc2. kVerify: compare instead of writing.
constexpr int64_t kBlocksPerPair = 2 * kMoeGroupStrips * kMoeSlabBlocks;
template <bool kVerify>
__global__ void __launch_bounds__(128) moe_pack_kernel(PackArgs args) {
  const int64_t blocks1 = moe_fc1_slab_pairs(args.hidden, args.inter) * kBlocksPerPair;
  const bool is_fc2 = blockIdx.x >= blocks1;
  const int64_t stored = is_fc2 ? blockIdx.x - blocks1 : blockIdx.x;
  const int cols = is_fc2 ? args.inter : args.hidden, slab_cols = moe_slab_cols(cols);
  const int per_strip = slab_cols * kMoeSlabBlocks;
  const int strip = static_cast<int>(stored / per_strip), k64 = static_cast<int>(stored % per_strip);
  const int group = strip / kMoeGroupStrips;
  const int64_t pair = moe_first_slab_pair(group, slab_cols) + k64 / kMoeSlabBlocks;
  const uint16_t* sides = is_fc2 ? args.sides2 : args.sides1;
  const MoeBlockPlace place = moe_block_place(strip, k64, moe_chunk_bits(sides ? sides[pair] : 0, group));
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint8_t* slab_pair = (is_fc2 ? args.fc2 : args.fc1) + pair * kMoeSlabPairBytes;
  uint4* packed_codes = reinterpret_cast<uint4*>(slab_pair + place.codes) + threadIdx.x;
  uint16_t* packed_scales = reinterpret_cast<uint16_t*>(slab_pair + place.scales) + 2 * threadIdx.x;
  const int64_t strips = is_fc2 ? moe_fc2_strips(args.hidden) : moe_fc1_strips(args.inter);
  if (strip >= strips || k64 >= cols / kMoeBlockCols) {  // padding: columns are multiplied with, by whatever numbers
    if (!kVerify) *packed_codes = make_uint4(0, 0, 0, 0), *packed_scales = 0;
    return;
  }
  uint32_t words[4];
  uint8_t sf[2], linear_sf[2], codes[2][16];
  for (int half = 0; half < 2; ++half) {
    const SourceRow source = source_row(args, is_fc2, strip, warp, g + 8 * half);
    linear_sf[half] = source.sf[k64 * 4 + t];
    for (int j = 0; j < 8; ++j) {
      const uint8_t byte = source.codes[k64 * 32 + t * 8 + j];
      codes[half][2 * j] = byte & 0xf;
      codes[half][2 * j + 1] = byte >> 4;
    }
  }
  if constexpr (!kVerify) {
    for (int half = 0; half < 2; ++half) {
      if (linear_sf[half] == 0)
        for (uint8_t& code : codes[half]) code = 0;
      words[2 * half] = moe_pack_codes(codes[half]);
      words[2 * half + 1] = moe_pack_codes(codes[half] + 8);
      sf[half] = moe_pack_sf(linear_sf[half]);
    }
    *packed_codes = make_uint4(words[0], words[1], words[2], words[3]);
    *packed_scales = static_cast<uint16_t>(sf[0] | sf[1] << 8);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      args.alpha[0] = args.gate.global.value;
      args.alpha[1] = args.up.global.value;
      args.alpha[2] = args.down.global.value;
    }
  } else {
    uint32_t a[2][2][4];
    decode_block(*packed_codes, *packed_scales, a);
    int wrong = 0;
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < 16; ++e) {  // element e = 4 step + 2 j + i
        const uint32_t word = a[e / 8][e / 4 % 2][(e / 2 % 2) * 2 + half];
        const float decoded = __uint_as_float(e % 2 == 0 ? word << 16 : word & 0xffff0000u) * kMoeAlphaScale;
        const float expected = decode_e2m1(codes[half][e]) * decode_ue4m3(linear_sf[half]);
        wrong += !(decoded == expected || (decoded != decoded && expected != expected));
      }
    if (blockIdx.x == 0 && threadIdx.x == 0)
      wrong += (args.alpha[0] != args.gate.global.value) + (args.alpha[1] != args.up.global.value) +
               (args.alpha[2] != args.down.global.value);
    if (wrong) atomicAdd(args.mismatches, static_cast<unsigned long long>(wrong));
  }
}

template <bool kVerify>
void run(const PackArgs& args, cudaStream_t stream) {
  DSV4_GPU_REQUIRE("pack_moe", args.hidden % 64 == 0 && args.inter % 64 == 0, "hidden %d, inter %d: multiples of 64",
                   args.hidden, args.inter);
  DSV4_GPU_REQUIRE("pack_moe",
                   reinterpret_cast<uintptr_t>(args.fc1) % kMoeChunkPairBytes == 0 &&
                       reinterpret_cast<uintptr_t>(args.fc2) % kMoeChunkPairBytes == 0,
                   "fc1 at %p, fc2 at %p, expected multiples of %lld", args.fc1, args.fc2,
                   static_cast<long long>(kMoeChunkPairBytes));
  gpu::LaunchConfig config;
  config.grid = static_cast<unsigned>(
      (moe_fc1_slab_pairs(args.hidden, args.inter) + moe_fc2_slab_pairs(args.hidden, args.inter)) * kBlocksPerPair);
  config.block = 128;
  config.stream = stream;
  gpu::launch(moe_pack_kernel<kVerify>, config, args);
}

PackArgs pack_args(const MoeLinearExpert& expert, int64_t hidden, int64_t inter, int64_t index, const uint8_t* fc1,
                   const uint8_t* fc2, const float* alpha, const MoeSides& sides, unsigned long long* mismatches) {
  PackArgs args{};
  args.gate = expert.w1, args.up = expert.w3, args.down = expert.w2;
  args.hidden = static_cast<int>(hidden), args.inter = static_cast<int>(inter);
  args.fc1 = const_cast<uint8_t*>(fc1) + index * moe_fc1_bytes(hidden, inter);
  args.fc2 = const_cast<uint8_t*>(fc2) + index * moe_fc2_bytes(hidden, inter);
  if (sides.fc1) args.sides1 = sides.fc1 + index * moe_fc1_slab_pairs(hidden, inter);
  if (sides.fc2) args.sides2 = sides.fc2 + index * moe_fc2_slab_pairs(hidden, inter);
  args.alpha = const_cast<float*>(alpha) + index * 3;
  args.mismatches = mismatches;
  return args;
}

}  // namespace

void find_moe_sides(const gpu::SmSides& sms, uint8_t* matrices, int64_t bytes, uint16_t* words, cudaStream_t stream) {
  constexpr int64_t kPairsOfChunks = kMoeSlabPairBytes / kMoeChunkPairBytes;
  static_assert(kMoeChunkBytes == gpu::kL2ChunkBytes);
  DSV4_GPU_REQUIRE("find_moe_sides",
                   bytes % kMoeSlabPairBytes == 0 && reinterpret_cast<uintptr_t>(matrices) % kMoeChunkPairBytes == 0,
                   "%lld bytes at %p, expected a multiple of %lld at one of %lld", static_cast<long long>(bytes),
                   static_cast<const void*>(matrices), static_cast<long long>(kMoeSlabPairBytes),
                   static_cast<long long>(kMoeChunkPairBytes));
  const int64_t slab_pairs = bytes / kMoeSlabPairBytes;
  const std::vector<uint8_t> sides = gpu::find_chunk_sides(sms, matrices, slab_pairs * 2 * kPairsOfChunks, stream);
  std::vector<uint16_t> host(static_cast<size_t>(slab_pairs));
  for (int64_t i = 0; i < slab_pairs * kPairsOfChunks; ++i) {
    const uint32_t first = sides[static_cast<size_t>(2 * i)], second = sides[static_cast<size_t>(2 * i + 1)];
    if (first != second)  // else one was measured wrong: either place is right, maybe slower
      host[static_cast<size_t>(i / kPairsOfChunks)] |= static_cast<uint16_t>(first << (i % kPairsOfChunks));
  }
  gpu::copy_to_device(words, host.data(), slab_pairs * 2, stream);
  DSV4_CUDA(cudaStreamSynchronize(stream));  // host goes away
}

void pack_moe_expert(const MoeLinearExpert& expert, int64_t hidden, int64_t inter, int64_t index, uint8_t* fc1,
                     uint8_t* fc2, float* alpha, const MoeSides& sides, cudaStream_t stream) {
  run<false>(pack_args(expert, hidden, inter, index, fc1, fc2, alpha, sides, nullptr), stream);
}
void verify_moe_expert(const MoeLinearExpert& expert, int64_t hidden, int64_t inter, int64_t index, const uint8_t* fc1,
                       const uint8_t* fc2, const float* alpha, const MoeSides& sides, unsigned long long* mismatches,
                       cudaStream_t stream) {
  run<true>(pack_args(expert, hidden, inter, index, fc1, fc2, alpha, sides, mismatches), stream);
}

}  // namespace dsv4::sm90
