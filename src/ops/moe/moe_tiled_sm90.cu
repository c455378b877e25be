// Launcher of the tiled tier.
#include <algorithm>

#include "gpu/launch.h"
#include "ops/moe/moe_tiled_sm90.cuh"

namespace dsv4::sm90 {

void launch_moe_tiled(const MoeTiledArgs& args, TiledPhase phase, int ctas, cudaStream_t stream) {
  gpu::LaunchConfig config;
  config.cluster = ctas > 1 ? 2 : 1;
  config.grid = ctas / config.cluster * config.cluster;
  config.block = kTiledThreads;
  config.smem_bytes = std::max({TiledTraits<TileList::kLarge>::kSmemBytes, TiledTraits<TileList::kSmall>::kSmemBytes,
                                TiledTraits<TileList::kTiny>::kSmemBytes});
  config.stream = stream;
  config.dependent = true;
  gpu::allow_smem(moe_tiled_kernel, config.smem_bytes);
  gpu::launch(moe_tiled_kernel, config, args, phase);
}

}  // namespace dsv4::sm90
