// What every GPU op needs besides its arguments: where it is queued and how large the machine is.
#pragma once

#include <cuda_runtime_api.h>

namespace dsv4 {

struct GpuContext {
  cudaStream_t stream = nullptr;
  int num_sms = 132;       // gpu::Device::num_sms
  bool dependent = false;  // launch with PDL: the kernel's prologue overlaps the predecessor's end (gpu/launch.h)
};

}  // namespace dsv4
