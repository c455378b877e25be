// Instances and launcher of the tiled tier.
#include "gpu/launch.h"
#include "ops/moe/moe_tiled_sm90.cuh"

namespace dsv4::sm90 {
namespace {

template <class T>
void launch_traits(const MoeTiledArgs& args, TiledPhase phase, int ctas, cudaStream_t stream) {
  gpu::allow_smem(moe_tiled_kernel<T>, T::kSmemBytes);
  gpu::LaunchConfig config;
  config.grid = ctas;
  config.block = T::kThreads;
  config.smem_bytes = T::kSmemBytes;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(moe_tiled_kernel<T>, config, args, phase);
}

}  // namespace

void launch_moe_tiled(const MoeTiledArgs& args, TiledPhase phase, int ctas, cudaStream_t stream) {
  launch_traits<TiledTraits<TileList::kLarge>>(args, phase, ctas, stream);
  launch_traits<TiledTraits<TileList::kSmall>>(args, phase, ctas, stream);
}

}  // namespace dsv4::sm90
