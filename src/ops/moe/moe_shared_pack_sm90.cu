// Packing of the shared expert's FP8 weights and its check: a warpgroup of threads per 64x64 block, as moe_pack_sm90.cu.
#include "codec/e4m3.h"
#include "gpu/launch.h"
#include "ops/moe/moe_decode_fp8_sm90.cuh"
#include "ops/moe/moe_shared_sm90.h"

namespace dsv4::sm90 {
namespace {

struct SharedPackArgs {
  MoeLinearShared linear;
  int hidden, inter;
  uint8_t* fc1;
  uint8_t* fc2;
  float* alpha;
  unsigned long long* mismatches;
};

__device__ float largest_scale(const float* scales, int rows, int cols) {
  float largest = 0.0f;
  const int count = (rows + 127) / 128 * ((cols + 127) / 128);
  for (int i = 0; i < count; ++i) largest = fmaxf(largest, scales[i]);
  return largest;
}

// blockIdx.x: blocks of fc1, then blocks of fc2. kVerify: compare instead of writing.
template <bool kVerify>
__global__ void __launch_bounds__(128) moe_shared_pack_kernel(SharedPackArgs args) {
  const int64_t blocks1 = moe_fc1_strips(args.inter) * (args.hidden / kMoeBlockCols);
  const bool is_fc2 = blockIdx.x >= blocks1;
  const int64_t block = is_fc2 ? blockIdx.x - blocks1 : blockIdx.x;
  const int rows = is_fc2 ? args.hidden : args.inter, cols = is_fc2 ? args.inter : args.hidden;
  const int per_strip = cols / kMoeBlockCols, strip = static_cast<int>(block / per_strip),
            k64 = static_cast<int>(block % per_strip);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint8_t* target = (is_fc2 ? args.fc2 : args.fc1) + block * kMoeFp8BlockBytes;
  __shared__ float largest[2];
  if (threadIdx.x < 2)
    largest[threadIdx.x] = largest_scale((is_fc2             ? args.linear.w2
                                          : threadIdx.x == 0 ? args.linear.w1
                                                             : args.linear.w3)
                                             .block_scales,
                                         rows, cols);
  __syncthreads();
  uint8_t codes[2][16];
  float scale[2];
  for (int half = 0; half < 2; ++half) {
    const MoeLinearFp8& m = is_fc2 ? args.linear.w2 : half == 0 ? args.linear.w1 : args.linear.w3;
    const int row = is_fc2 ? moe_fc2_row(strip, warp, g + 8 * half) : moe_fc1_row(strip, warp, g);
    scale[half] = m.block_scales[row / 128 * ((cols + 127) / 128) + k64 / 2];
    for (int j = 0; j < 16; ++j) codes[half][j] = m.codes[static_cast<int64_t>(row) * cols + k64 * 64 + t * 16 + j];
  }
  if constexpr (!kVerify) {
    const auto word = [&](int row, int step) {
      const uint8_t* c = codes[row] + 4 * step;
      return c[0] | c[2] << 8 | c[1] << 16 | static_cast<uint32_t>(c[3]) << 24;
    };
    // the exponent of a bf16; one pair of scales a block: strips and blocks of 64 never straddle 128
    const auto factor = [&](int row) {
      return encode_bf16(scale[row] / largest[is_fc2 ? 0 : row] * 0x1p120f).bits >> 7 & 0xffu;
    };
    for (int half = 0; half < 2; ++half) {
      uint8_t* to = target + half * kMoeFp8HalfBytes;
      *reinterpret_cast<uint4*>(to + threadIdx.x * 16) =
          make_uint4(word(0, 2 * half), word(0, 2 * half + 1), word(1, 2 * half), word(1, 2 * half + 1));
      if (threadIdx.x == 0)
        *reinterpret_cast<uint4*>(to + kMoeBlockCodeBytes) = make_uint4(factor(0) | factor(1) << 8, 0, 0, 0);
    }
    if (block == 0 && threadIdx.x == 0) {
      args.alpha[is_fc2 ? 2 : 0] = largest[0];
      if (!is_fc2) args.alpha[1] = largest[1];
    }
  } else {
    uint32_t a[2][2][4];
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = target + half * kMoeFp8HalfBytes;
      decode_fp8_half_block(*reinterpret_cast<const uint4*>(from + threadIdx.x * 16),
                            *reinterpret_cast<const uint16_t*>(from + kMoeBlockCodeBytes), a[half]);
    }
    int wrong = 0;
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < 16; ++e) {
        const uint32_t word = a[e / 8][e / 4 % 2][e / 2 % 2 * 2 + half];
        const float decoded =
            __uint_as_float(e % 2 == 0 ? word << 16 : word & 0xffff0000u) * args.alpha[is_fc2 ? 2 : half];
        wrong += decoded != decode_e4m3(codes[half][e]) * scale[half];
      }
    if (wrong) atomicAdd(args.mismatches, static_cast<unsigned long long>(wrong));
  }
}

template <bool kVerify>
void run(const SharedPackArgs& args, cudaStream_t stream) {
  DSV4_GPU_REQUIRE("pack_moe_shared", args.hidden % 64 == 0 && args.inter % 64 == 0,
                   "hidden %d, inter %d: multiples of 64", args.hidden, args.inter);
  gpu::LaunchConfig config;
  config.grid = static_cast<unsigned>(
      (moe_shared_fc1_bytes(args.hidden, args.inter) + moe_shared_fc2_bytes(args.hidden, args.inter)) /
      kMoeFp8BlockBytes);
  config.block = 128;
  config.stream = stream;
  gpu::launch(moe_shared_pack_kernel<kVerify>, config, args);
}

}  // namespace

void pack_moe_shared(const MoeLinearShared& expert, int64_t hidden, int64_t inter, uint8_t* fc1, uint8_t* fc2,
                     float* alpha, cudaStream_t stream) {
  run<false>({expert, static_cast<int>(hidden), static_cast<int>(inter), fc1, fc2, alpha, nullptr}, stream);
}
void verify_moe_shared(const MoeLinearShared& expert, int64_t hidden, int64_t inter, const uint8_t* fc1,
                       const uint8_t* fc2, const float* alpha, unsigned long long* mismatches, cudaStream_t stream) {
  run<true>({expert, static_cast<int>(hidden), static_cast<int>(inter), const_cast<uint8_t*>(fc1),
             const_cast<uint8_t*>(fc2), const_cast<float*>(alpha), mismatches},
            stream);
}

}  // namespace dsv4::sm90
