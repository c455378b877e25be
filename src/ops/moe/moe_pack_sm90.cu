// Packing of expert weights and its check. A warpgroup of threads per 64x64 block, in the order the kernels read.
#include "codec/e4m3.h"
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

// blockIdx.x: blocks of fc1, then blocks of fc2. kVerify: compare instead of writing.
template <bool kVerify>
__global__ void __launch_bounds__(128) moe_pack_kernel(PackArgs args) {
  const int64_t blocks1 = moe_fc1_strips(args.inter) * (args.hidden / kMoeBlockCols);
  const bool is_fc2 = blockIdx.x >= blocks1;
  const int64_t block = is_fc2 ? blockIdx.x - blocks1 : blockIdx.x;
  const int per_strip = (is_fc2 ? args.inter : args.hidden) / kMoeBlockCols;
  const int strip = static_cast<int>(block / per_strip), k64 = static_cast<int>(block % per_strip);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint8_t* target = (is_fc2 ? args.fc2 : args.fc1) + block * kMoeBlockBytes;
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
    *reinterpret_cast<uint4*>(target + threadIdx.x * 16) = make_uint4(words[0], words[1], words[2], words[3]);
    *reinterpret_cast<uint16_t*>(target + kMoeBlockCodeBytes + threadIdx.x * 2) =
        static_cast<uint16_t>(sf[0] | sf[1] << 8);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      args.alpha[0] = args.gate.global.value;
      args.alpha[1] = args.up.global.value;
      args.alpha[2] = args.down.global.value;
    }
  } else {
    uint32_t a[2][2][4];
    const uint4 packed = *reinterpret_cast<const uint4*>(target + threadIdx.x * 16);
    decode_block(packed, *reinterpret_cast<const uint16_t*>(target + kMoeBlockCodeBytes + threadIdx.x * 2), a);
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
  gpu::LaunchConfig config;
  config.grid = static_cast<unsigned>(
      (moe_fc1_bytes(args.hidden, args.inter) + moe_fc2_bytes(args.hidden, args.inter)) / kMoeBlockBytes);
  config.block = 128;
  config.stream = stream;
  gpu::launch(moe_pack_kernel<kVerify>, config, args);
}

PackArgs pack_args(const MoeLinearExpert& expert, int64_t hidden, int64_t inter, int64_t index, const uint8_t* fc1,
                   const uint8_t* fc2, const float* alpha, unsigned long long* mismatches) {
  return {expert.w1,
          expert.w3,
          expert.w2,
          static_cast<int>(hidden),
          static_cast<int>(inter),
          const_cast<uint8_t*>(fc1) + index * moe_fc1_bytes(hidden, inter),
          const_cast<uint8_t*>(fc2) + index * moe_fc2_bytes(hidden, inter),
          const_cast<float*>(alpha) + index * 3,
          mismatches};
}

}  // namespace

void pack_moe_expert(const MoeLinearExpert& expert, int64_t hidden, int64_t inter, int64_t index, uint8_t* fc1,
                     uint8_t* fc2, float* alpha, cudaStream_t stream) {
  run<false>(pack_args(expert, hidden, inter, index, fc1, fc2, alpha, nullptr), stream);
}
void verify_moe_expert(const MoeLinearExpert& expert, int64_t hidden, int64_t inter, int64_t index, const uint8_t* fc1,
                       const uint8_t* fc2, const float* alpha, unsigned long long* mismatches, cudaStream_t stream) {
  run<true>(pack_args(expert, hidden, inter, index, fc1, fc2, alpha, mismatches), stream);
}

}  // namespace dsv4::sm90
