// Where a call runs: the CPU reference, or, in builds with CUDA, the kernels on the caller's stream. Both without the GIL.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "array.h"
#include "ops/cpu_context.h"
#ifdef DSV4_PYTHON_CUDA
#include "gpu/context.h"
#endif

namespace dsv4::py {

// One pool per process, remade after a fork (threads do not survive one); calls take turns.
struct CpuSide {
  std::mutex turn;
  ThreadPool pool;
};
CpuSide& cpu_side();

#ifdef DSV4_PYTHON_CUDA
// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
};
GpuContext gpu_context(int ordinal, uint64_t stream);
#endif

// A host copy of an int32 array; waits for the stream when it lies on a device.
std::vector<int32_t> host_copy(const Array& array, uint64_t stream);

// Throws ValueError naming the first element outside [lowest, limit).
void check_bounds(const std::string& name, const std::vector<int32_t>& values, int64_t lowest, int64_t limit,
                  std::string_view limit_name);

// Refuses CUDA arrays in a build without CUDA.
void check_device(const Array& first);

// body(context) with a CpuContext or a GpuContext.
template <class Body>
void run_where(const Array& first, [[maybe_unused]] uint64_t stream, const Body& body) {
  if (!first.device().cuda) {
    const nb::gil_scoped_release without_gil;
    CpuSide& side = cpu_side();
    const std::lock_guard lock(side.turn);
    body(CpuContext{side.pool});
    return;
  }
  check_device(first);
#ifdef DSV4_PYTHON_CUDA
  const nb::gil_scoped_release without_gil;
  const DeviceScope scope(first.device().ordinal);
  body(gpu_context(first.device().ordinal, stream));
#endif
}

}  // namespace dsv4::py
