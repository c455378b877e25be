// CudaError: what CUDA said, and about which op and shape.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "base/check.h"

namespace dsv4::gpu {

class CudaError : public Error {
 public:
  CudaError(cudaError_t code, const std::string& message);
  cudaError_t code() const { return code_; }

 private:
  cudaError_t code_;
};

}  // namespace dsv4::gpu
