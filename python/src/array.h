// Arrays of any framework as the ops take them: imported through DLPack, then checked one property at a time.
//
// Every check throws ValueError "<argument>: expected <what>, found <what>". bfloat16 also passes as uint16 bit patterns, for
// numpy, which has no such type.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "codec/bf16.h"

namespace dsv4::py {

namespace nb = nanobind;

enum class Type : uint8_t { kByte, kInt32, kFloat32, kBf16 };
enum class Access : uint8_t { kRead, kWrite };

struct Device {
  bool cuda = false;
  int ordinal = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

[[noreturn]] void throw_value_error(std::string_view argument, std::string_view expected, std::string_view found);

// Keeps the caller's array alive while it exists; destroy with the GIL held.
class Array {
 public:
  Array(std::string name, nb::handle object, Access access);

  const std::string& name() const { return name_; }
  Device device() const { return device_; }
  int64_t ndim() const { return static_cast<int64_t>(shape_.size()); }
  int64_t size(int64_t axis) const { return shape_[static_cast<size_t>(axis)]; }
  int64_t num_elements() const;
  int64_t row_stride() const { return size(0) <= 1 ? size(1) : stride_[0]; }  // elements, of a 2-D array
  bool is(Type type) const;

  // Each returns *this, so that checks read as one sentence.
  const Array& of(Type type) const;
  const Array& of_either(Type one, Type other) const;
  const Array& with_ndim(int64_t ndim) const;
  const Array& shaped(const std::vector<int64_t>& shape) const;
  const Array& shaped_or_flat(const std::vector<int64_t>& shape) const;  // or 1-D with as many elements
  const Array& contiguous() const;
  const Array& with_dense_rows() const;       // 2-D, elements of a row adjacent, rows not overlapping
  const Array& on(const Array& other) const;  // same device
  const Array& aligned() const;               // to 16 bytes, on a CUDA device

  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  std::string name_;
  nb::ndarray<> written_;
  nb::ndarray<nb::ro> read_;
  void* data_ = nullptr;
  nb::dlpack::dtype dtype_{};
  Device device_;
  std::vector<int64_t> shape_, stride_;
};

// None is no array.
std::optional<Array> optional_array(const char* name, nb::handle object, Access access);

template <class T>
T* data_or_null(const std::optional<Array>& array) {
  return array ? array->data<T>() : nullptr;
}

}  // namespace dsv4::py
