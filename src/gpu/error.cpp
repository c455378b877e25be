// The throwing side of gpu/check.h.
#include "gpu/error.h"

#include <cstdarg>
#include <cstdio>

#include "gpu/check.h"

namespace dsv4::gpu {
namespace {

ErrorKind kind_of(cudaError_t code) {
  switch (code) {
    case cudaErrorMemoryAllocation:
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInitializationError:
    case cudaErrorNoKernelImageForDevice:
      return ErrorKind::kResourceMissing;
    default:
      return ErrorKind::kInternal;
  }
}

std::string vformat(const char* format, va_list arguments) {
  char text[512];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

}  // namespace

CudaError::CudaError(cudaError_t code, const std::string& message)
    : Error(kind_of(code), fmt::format("{}: {} ({})", message, cudaGetErrorString(code), cudaGetErrorName(code))),
      code_(code) {}

void throw_cuda_error(cudaError_t code, const char* call, const char* file, int line) {
  cudaGetLastError();  // told now: the next check_launch must not tell it again, of a launch that worked
  throw CudaError(code, fmt::format("{}:{}: {}", file, line, call));
}

void throw_bad_argument(const char* op, const char* condition, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string text = vformat(format, arguments);
  va_end(arguments);
  throw Error(ErrorKind::kInternal, fmt::format("{}: {}: {}", op, condition, text));
}

void check_launch(const char* op, const char* shape_format, ...) {
  const cudaError_t code = cudaGetLastError();
  if (code == cudaSuccess) return;
  va_list arguments;
  va_start(arguments, shape_format);
  const std::string shape = vformat(shape_format, arguments);
  va_end(arguments);
  throw CudaError(code, fmt::format("{} {}", op, shape));
}

}  // namespace dsv4::gpu
