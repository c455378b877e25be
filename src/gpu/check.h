// Light checks for CUDA sources: no fmt, so that a kernel file compiles fast. The throwing side is in error.cpp.
#pragma once

#include <cuda_runtime_api.h>

namespace dsv4::gpu {

// Throws CudaError (gpu/error.h) with CUDA's own text, the call, and file:line.
[[noreturn]] void throw_cuda_error(cudaError_t code, const char* call, const char* file, int line);

// Throws Error(kInternal): op, the broken condition, and the printf-formatted numbers.
[[noreturn, gnu::format(printf, 3, 4)]] void throw_bad_argument(const char* op, const char* condition,
                                                                const char* format, ...);

// After a launch: throws CudaError naming the op and its shape if the launch failed.
[[gnu::format(printf, 2, 3)]] void check_launch(const char* op, const char* shape_format, ...);

}  // namespace dsv4::gpu

#define DSV4_CUDA(call)                                                                                  \
  do {                                                                                                   \
    const cudaError_t dsv4_code_ = (call);                                                               \
    if (dsv4_code_ != cudaSuccess) ::dsv4::gpu::throw_cuda_error(dsv4_code_, #call, __FILE__, __LINE__); \
  } while (false)

#define DSV4_GPU_REQUIRE(op, condition, ...)                                        \
  do {                                                                              \
    if (!(condition)) ::dsv4::gpu::throw_bad_argument(op, #condition, __VA_ARGS__); \
  } while (false)
