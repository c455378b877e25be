// Device discovery.
#include "gpu/device.h"

#include "gpu/check.h"

namespace dsv4::gpu {
namespace {

int attribute(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  DSV4_CUDA(cudaDeviceGetAttribute(&value, which, ordinal));
  return value;
}

Device describe(int ordinal) {
  cudaDeviceProp properties{};
  DSV4_CUDA(cudaGetDeviceProperties(&properties, ordinal));
  Device device;
  device.ordinal = ordinal;
  device.name = properties.name;
  device.major = properties.major;
  device.minor = properties.minor;
  device.num_sms = properties.multiProcessorCount;
  device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  device.l2_bytes = properties.l2CacheSize;
  device.max_smem_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  const int capability = 10 * device.major + device.minor;
  device.has_kernels = capability == 90 || capability == 100 || capability == 120;
  return device;
}

}  // namespace

DeviceList find_devices() {
  DeviceList list;
  cudaRuntimeGetVersion(&list.runtime_version);
  if (cudaDriverGetVersion(&list.driver_version) != cudaSuccess) list.driver_version = 0;
  if (list.driver_version == 0) {
    list.absence = "no NVIDIA driver (libcuda.so.1 was not found)";
    return list;
  }
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess || count == 0) {
    list.absence = code == cudaSuccess ? "the driver reports no device" : cudaGetErrorString(code);
    cudaGetLastError();  // not sticky: later calls must not see it
    return list;
  }
  for (int ordinal = 0; ordinal < count; ++ordinal) list.devices.push_back(describe(ordinal));
  return list;
}

Device current_device() {
  int ordinal = 0;
  DSV4_CUDA(cudaGetDevice(&ordinal));
  return describe(ordinal);
}

}  // namespace dsv4::gpu
