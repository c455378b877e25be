// Device discovery.
#include "gpu/device.h"

#include <string_view>

#include "gpu/check.h"

namespace dsv4::gpu {
namespace {

// archs: "90a,100a,120a". 90a is compute capability 9.0 and no other; 90 and 90f are 9.0 and later ones of 9.x.
constexpr bool covers(std::string_view archs, int major, int minor) {
  for (size_t at = 0; at < archs.size(); ++at) {
    int number = 0;
    for (; at < archs.size() && archs[at] >= '0' && archs[at] <= '9'; ++at) number = 10 * number + archs[at] - '0';
    const bool only = at < archs.size() && archs[at] == 'a';
    if (number / 10 == major && (only ? minor == number % 10 : minor >= number % 10)) return true;
    while (at < archs.size() && archs[at] != ',') ++at;
  }
  return false;
}
static_assert(covers("90a,100a,120a", 10, 0) && covers("90a,100a,120a", 12, 0) && !covers("90a,100a,120a", 12, 1));
static_assert(covers("90a", 9, 0) && !covers("90a", 10, 0) && covers("100f", 10, 3) && covers("90", 9, 0) &&
              !covers("", 9, 0));

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
  device.has_kernels = has_kernels_for(device.major, device.minor);
  return device;
}

}  // namespace

bool has_kernels_for(int major, int minor) { return covers(DSV4_CUDA_ARCHS, major, minor); }

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
