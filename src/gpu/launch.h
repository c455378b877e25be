// launch(): cudaLaunchKernelEx with clusters and programmatic dependent launch (PDL).
//
// With dependent = true the kernel may start while its predecessor on the stream still runs; it must call
// ptx::griddepcontrol_wait() before it reads or writes anything a predecessor touches. Every kernel of this library calls
// it in every thread before its first access to memory that is not a weight, so the attribute is always legal for them; those
// that do more ahead (compress_quantize, decode; the ring tier of moe_gpu) say in their header what the predecessor must leave
// alone. The kernel before the predecessor has finished by then, because kernels let their dependents start only after their own wait.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "gpu/check.h"

namespace dsv4::gpu {

struct LaunchConfig {
  dim3 grid = 1;
  dim3 block = 1;
  int smem_bytes = 0;  // dynamic
  cudaStream_t stream = nullptr;
  int cluster = 1;         // CTAs along x; above 8 the kernel must have been given allow_large_cluster()
  bool dependent = false;  // PDL
};

// Opt in to more than 48 KiB of dynamic shared memory. Once per kernel and device.
template <class... P>
void allow_smem(void (*kernel)(P...), int bytes) {
  if (bytes > 48 * 1024) DSV4_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}
template <class... P>
void allow_large_cluster(void (*kernel)(P...)) {
  DSV4_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// How many clusters of one kernel and shape a device holds at once: an object for each. Asked, and the kernel's opt-ins made, once per device.
class ClusterCapacity {
 public:
  template <class... P>
  int of(void (*kernel)(P...), const LaunchConfig& config) {
    int device = 0;
    DSV4_CUDA(cudaGetDevice(&device));
    int clusters = device < kDevices ? known_[device].load() - 1 : -1;
    if (clusters >= 0) return clusters;
    allow_smem(kernel, config.smem_bytes);
    if (config.cluster > 8) allow_large_cluster(kernel);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(config.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t raw{};
    raw.gridDim = dim3(static_cast<unsigned>(config.cluster));
    raw.blockDim = config.block;
    raw.dynamicSmemBytes = static_cast<size_t>(config.smem_bytes);
    raw.attrs = &attribute;
    raw.numAttrs = 1;
    DSV4_CUDA(cudaOccupancyMaxActiveClusters(&clusters, kernel, &raw));
    if (device < kDevices) known_[device] = clusters + 1;
    return clusters;
  }

 private:
  static constexpr int kDevices = 16;      // of a process
  std::atomic<int> known_[kDevices] = {};  // clusters + 1
};

template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (config.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t raw{};
  raw.gridDim = config.grid;
  raw.blockDim = config.block;
  raw.dynamicSmemBytes = static_cast<size_t>(config.smem_bytes);
  raw.stream = config.stream;
  raw.attrs = attributes;
  raw.numAttrs = static_cast<unsigned>(count);
  DSV4_CUDA(cudaLaunchKernelEx(&raw, kernel, P(static_cast<A&&>(arguments))...));
}

}  // namespace dsv4::gpu
