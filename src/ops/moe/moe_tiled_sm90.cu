// Instance and launcher of the tiled tier.
#include "gpu/launch.h"
#include "ops/moe/moe_tiled_sm90.cuh"

namespace dsv4::sm90 {

void launch_moe_tiled(const MoeTiledArgs& args, TiledPhase phase, int ctas, cudaStream_t stream) {
  const auto kernel = moe_tiled_kernel<>;
  gpu::allow_smem(kernel, TiledTraits::kSmemBytes);
  gpu::LaunchConfig config;
  config.grid = ctas;
  config.block = TiledTraits::kThreads;
  config.smem_bytes = TiledTraits::kSmemBytes;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(kernel, config, args, phase);
}

}  // namespace dsv4::sm90
