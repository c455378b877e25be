// Instances and launchers of the two one-launch kernels.
#include "gpu/launch.h"
#include "ops/moe/moe_ring_sm90.cuh"
#include "ops/moe/moe_stream_sm90.cuh"

namespace dsv4::sm90 {
namespace {

template <class Traits>
void launch_one(void (*kernel)(MoeStreamArgs), const MoeStreamArgs& args, int ctas, cudaStream_t stream) {
  static_assert(Traits::kSmemBytes - Traits::kRingOffset >= kRouteScratch<Traits>);
  gpu::allow_smem(kernel, Traits::kSmemBytes);
  gpu::LaunchConfig config;
  config.grid = ctas;
  config.block = Traits::kThreads;
  config.smem_bytes = Traits::kSmemBytes;
  config.stream = stream;
  config.dependent = true;
  gpu::launch(kernel, config, args);
}

}  // namespace

void launch_moe_ring(const MoeStreamArgs& args, int ctas, cudaStream_t stream) {
  using WithShared = RingTraits<StreamMode::kFull, true>;
  if (args.shared.fc1)
    launch_one<WithShared>(moe_ring_kernel<WithShared>, args, ctas, stream);
  else
    launch_one<RingTraits<>>(moe_ring_kernel<RingTraits<>>, args, ctas, stream);
}
void launch_moe_stream(const MoeStreamArgs& args, int ctas, cudaStream_t stream) {
  using WithShared = StreamTraits<StreamMode::kFull, true>;
  if (args.shared.fc1)
    launch_one<WithShared>(moe_stream_kernel<WithShared>, args, ctas, stream);
  else
    launch_one<StreamTraits<>>(moe_stream_kernel<StreamTraits<>>, args, ctas, stream);
}

}  // namespace dsv4::sm90
