// DeviceBuffer and PinnedBuffer: owning memory. Copies are asynchronous on the stream given.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "gpu/check.h"

namespace dsv4::gpu {

template <cudaError_t (*kAllocate)(void**, size_t), cudaError_t (*kFree)(void*)>
class BasicBuffer {
 public:
  BasicBuffer() = default;
  explicit BasicBuffer(int64_t bytes) : bytes_(bytes) {
    if (bytes > 0) DSV4_CUDA(kAllocate(&data_, static_cast<size_t>(bytes)));
  }
  BasicBuffer(BasicBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  BasicBuffer& operator=(BasicBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~BasicBuffer() {
    if (data_) kFree(data_);
  }
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

namespace detail {
inline cudaError_t allocate_device(void** data, size_t bytes) { return cudaMalloc(data, bytes); }
inline cudaError_t free_device(void* data) { return cudaFree(data); }
inline cudaError_t allocate_pinned(void** data, size_t bytes) {
  return cudaHostAlloc(data, bytes, cudaHostAllocDefault);
}
inline cudaError_t free_pinned(void* data) { return cudaFreeHost(data); }
}  // namespace detail

using DeviceBuffer = BasicBuffer<detail::allocate_device, detail::free_device>;  // uninitialised, 256-byte aligned
using PinnedBuffer =
    BasicBuffer<detail::allocate_pinned, detail::free_pinned>;  // host memory the copy engines reach directly

// Device memory from a multiple of `alignment` on, a power of two.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(int64_t bytes, int64_t alignment) : memory_(bytes + alignment), alignment_(alignment) {}
  int64_t bytes() const { return memory_.data() ? memory_.bytes() - alignment_ : 0; }
  template <class T>
  T* as() const {
    if (!memory_.data()) return nullptr;
    const intptr_t address = reinterpret_cast<intptr_t>(memory_.data());
    return reinterpret_cast<T*>((address + alignment_ - 1) / alignment_ * alignment_);
  }

 private:
  DeviceBuffer memory_;
  int64_t alignment_ = 1;
};

inline void copy_to_device(void* device, const void* host, int64_t bytes, cudaStream_t stream) {
  DSV4_CUDA(cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream));
}
inline void copy_to_host(void* host, const void* device, int64_t bytes, cudaStream_t stream) {
  DSV4_CUDA(cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream));
}
inline void copy_on_device(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  DSV4_CUDA(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream));
}
inline void fill(void* device, int byte, int64_t bytes, cudaStream_t stream) {
  DSV4_CUDA(cudaMemsetAsync(device, byte, static_cast<size_t>(bytes), stream));
}

}  // namespace dsv4::gpu
