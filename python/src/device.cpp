// The process-wide pool, CUDA devices and host copies of index arrays.
#include "device.h"

#include <fmt/format.h>
#include <unistd.h>

#ifdef DSV4_PYTHON_CUDA
#include "gpu/buffer.h"
#include "gpu/device.h"
#endif

namespace dsv4::py {

CpuSide& cpu_side() {
  static std::mutex guard;
  static CpuSide* side = nullptr;
  static pid_t owner = 0;
  const std::lock_guard lock(guard);
  // A forked child leaks its parent's pool: joining threads that do not exist would never end.
  if (owner != getpid()) {
    side = new CpuSide;
    owner = getpid();
  }
  return *side;
}

#ifdef DSV4_PYTHON_CUDA
DeviceScope::DeviceScope(int ordinal) {
  DSV4_CUDA(cudaGetDevice(&previous_));
  if (previous_ != ordinal) DSV4_CUDA(cudaSetDevice(ordinal));
}
DeviceScope::~DeviceScope() { cudaSetDevice(previous_); }

GpuContext gpu_context(int ordinal, uint64_t stream) {
  static std::mutex guard;
  static std::vector<int> num_sms;  // per ordinal; 0 = not asked yet
  const std::lock_guard lock(guard);
  if (num_sms.size() <= static_cast<size_t>(ordinal)) num_sms.resize(static_cast<size_t>(ordinal) + 1);
  int& count = num_sms[static_cast<size_t>(ordinal)];
  if (count == 0) count = gpu::current_device().num_sms;
  return {.stream = reinterpret_cast<cudaStream_t>(stream), .num_sms = count};
}
#endif

std::vector<int32_t> host_copy(const Array& array, [[maybe_unused]] uint64_t stream) {
  std::vector<int32_t> values(static_cast<size_t>(array.num_elements()));
  if (!array.device().cuda) {
    std::copy_n(array.data<int32_t>(), values.size(), values.begin());
    return values;
  }
  check_device(array);
#ifdef DSV4_PYTHON_CUDA
  const nb::gil_scoped_release without_gil;
  const DeviceScope scope(array.device().ordinal);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  gpu::copy_to_host(values.data(), array.data<int32_t>(), array.num_elements() * 4, queue);
  DSV4_CUDA(cudaStreamSynchronize(queue));
#endif
  return values;
}

void check_bounds(const std::string& name, const std::vector<int32_t>& values, int64_t lowest, int64_t limit,
                  std::string_view limit_name) {
  for (size_t i = 0; i < values.size(); ++i)
    if (values[i] < lowest || values[i] >= limit)
      throw_value_error(name, fmt::format("{} <= index < {} ({})", lowest, limit, limit_name),
                        fmt::format("{} at [{}]", values[i], i));
}

void check_device([[maybe_unused]] const Array& first) {
#ifndef DSV4_PYTHON_CUDA
  if (first.device().cuda)
    throw_value_error(
        first.name(),
        "a CPU array (this build of dsv4 has no CUDA; pip install . -C cmake.define.DSV4_CUDA=ON builds one that has)",
        fmt::format("cuda:{}", first.device().ordinal));
#endif
}

}  // namespace dsv4::py
