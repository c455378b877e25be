// What GPUs this process can use. Works, and says why not, on a machine without a driver.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsv4::gpu {

struct Device {
  int ordinal = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int num_sms = 0;
  int64_t memory_bytes = 0;
  int64_t l2_bytes = 0;
  int max_smem_bytes = 0;    // a block's dynamic shared memory after opting in
  bool has_kernels = false;  // has_kernels_for(major, minor)
};

struct DeviceList {
  std::vector<Device> devices;
  std::string absence;     // why the list is empty: no driver, driver too old, no device; else ""
  int driver_version = 0;  // as CUDA numbers it: 13000 is 13.0; 0 without a driver
  int runtime_version = 0;
};

// Whether this binary holds machine code of the *_cuda.cu kernels, which DSV4_CUDA_ARCHS names, for a compute capability.
bool has_kernels_for(int major, int minor);

// Never throws for an absent or broken driver.
DeviceList find_devices();

// The current device; throws CudaError (kResourceMissing) when there is none.
Device current_device();

}  // namespace dsv4::gpu
