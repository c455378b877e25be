// Shape, TensorView (does not own) and HostBuffer (owns, 64-byte aligned).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tensor/dtype.h"

namespace dsv4 {

using Shape = std::vector<int64_t>;

std::string to_string(const Shape& shape);  // "[4096, 256]"; a scalar is "[]"
int64_t num_elements(const Shape& shape);   // 1 for a scalar; the caller has checked for overflow

// Dense row-major data somewhere in host memory.
struct TensorView {
  DType dtype = DType::kF32;
  Shape shape;
  const std::byte* data = nullptr;

  int64_t elements() const { return num_elements(shape); }
  int64_t bytes() const { return elements() * dtype_bytes(dtype); }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data);
  }
};

// Uninitialised memory, 64-byte aligned, freed on destruction. Move-only.
class HostBuffer {
 public:
  HostBuffer() = default;
  explicit HostBuffer(int64_t bytes);

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(std::byte* pointer) const;
  };
  std::unique_ptr<std::byte[], Free> data_;
  int64_t bytes_ = 0;
};

}  // namespace dsv4
