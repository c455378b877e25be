// Stands in for src/gpu/launch.h: a launch runs to its end before it returns.
#pragma once

#include "emulate.h"
#include "gpu/check.h"

namespace dsv4::gpu {

struct LaunchConfig {
  uint32_t grid = 1, block = 1;
  int smem_bytes = 0;
  cudaStream_t stream = nullptr;
  int cluster = 1;
  bool dependent = false;
};

template <class... P>
void allow_smem(void (*)(P...), int) {}
template <class... P>
void allow_large_cluster(void (*)(P...)) {}
template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& config, const A&... arguments) {
  emulate::run(config.grid, config.block, config.smem_bytes, config.cluster, [&] { kernel(P(arguments)...); });
}

// Two clusters at once: enough for work to be spread over clusters, and few enough for much of it in each.
struct ClusterCapacity {
  template <class... P>
  int of(void (*)(P...), const LaunchConfig&) {
    return 2;
  }
};

}  // namespace dsv4::gpu
