// Instances and launcher of the streaming tier.
#include "gpu/launch.h"
#include "ops/moe/moe_stream_sm90.cuh"

namespace dsv4::sm90 {
namespace {

template <int kMaxRows>
void launch_rows(const MoeStreamArgs& args, int ctas, cudaStream_t stream) {
  using Traits = StreamTraits<kMaxRows>;
  const auto kernel = moe_stream_kernel<Traits>;
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

void launch_moe_stream(const MoeStreamArgs& args, int max_rows, int ctas, cudaStream_t stream) {
  DSV4_GPU_REQUIRE("moe_stream", max_rows == 8 || max_rows == 16, "max_rows = %d", max_rows);
  if (max_rows == 8)
    launch_rows<8>(args, ctas, stream);
  else
    launch_rows<16>(args, ctas, stream);
}

}  // namespace dsv4::sm90
