// Import and checks of array.h.
#include "array.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace dsv4::py {
namespace {

constexpr int kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlCudaManaged = 13;

std::string_view type_name(Type type) {
  switch (type) {
    case Type::kByte:
      return "uint8";
    case Type::kInt32:
      return "int32";
    case Type::kFloat32:
      return "float32";
    case Type::kBf16:
      return "bfloat16 (numpy: uint16 bit patterns)";
  }
  return "";
}

std::string dtype_name(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  const char* kind = "dtype code ";
  switch (static_cast<Code>(dtype.code)) {
    case Code::Int:
      kind = "int";
      break;
    case Code::UInt:
      kind = "uint";
      break;
    case Code::Float:
      kind = "float";
      break;
    case Code::Bfloat:
      kind = "bfloat";
      break;
    case Code::Complex:
      kind = "complex";
      break;
    case Code::Bool:
      kind = "bool";
      break;
    default:
      return fmt::format("dtype code {} of {} bits", dtype.code, dtype.bits);
  }
  return fmt::format("{}{}", kind, dtype.bits);
}

std::string shape_name(const std::vector<int64_t>& shape) { return fmt::format("shape ({})", fmt::join(shape, ", ")); }

std::string device_name(Device device) { return device.cuda ? fmt::format("cuda:{}", device.ordinal) : "cpu"; }

Device device_of(const std::string& name, int type, int ordinal) {
  if (type == kDlCpu || type == kDlCudaHost) return {};
  if (type == kDlCuda || type == kDlCudaManaged) return {true, ordinal};
  throw_value_error(name, "an array on a CPU or CUDA device", fmt::format("DLPack device type {}", type));
}

}  // namespace

void throw_value_error(std::string_view argument, std::string_view expected, std::string_view found) {
  throw nb::value_error(fmt::format("{}: expected {}, found {}", argument, expected, found).c_str());
}

Array::Array(std::string name, nb::handle object, Access access) : name_(std::move(name)) {
  const auto take = [&](auto& array) {
    if (!nb::try_cast(object, array, false)) {
      const char* expected =
          access == Access::kWrite ? "a writable array that exports DLPack" : "an array that exports DLPack";
      throw_value_error(name_, expected, nb::type_name(object.type()).c_str());
    }
    data_ = const_cast<void*>(static_cast<const void*>(array.data()));
    dtype_ = array.dtype();
    device_ = device_of(name_, array.device_type(), array.device_id());
    for (size_t axis = 0; axis < array.ndim(); ++axis) {
      shape_.push_back(static_cast<int64_t>(array.shape(axis)));
      stride_.push_back(array.stride(axis));
    }
  };
  if (access == Access::kWrite)
    take(written_);
  else
    take(read_);
}

int64_t Array::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape_) count *= size;
  return count;
}

bool Array::is(Type type) const {
  using Code = nb::dlpack::dtype_code;
  const Code code = static_cast<Code>(dtype_.code);
  if (dtype_.lanes != 1) return false;
  switch (type) {
    case Type::kByte:
      return code == Code::UInt && dtype_.bits == 8;
    case Type::kInt32:
      return code == Code::Int && dtype_.bits == 32;
    case Type::kFloat32:
      return code == Code::Float && dtype_.bits == 32;
    case Type::kBf16:
      return (code == Code::Bfloat || code == Code::UInt) && dtype_.bits == 16;
  }
  return false;
}

const Array& Array::of(Type type) const {
  if (!is(type)) throw_value_error(name_, fmt::format("dtype {}", type_name(type)), dtype_name(dtype_));
  return *this;
}

const Array& Array::of_either(Type one, Type other) const {
  if (!is(one) && !is(other))
    throw_value_error(name_, fmt::format("dtype {} or {}", type_name(one), type_name(other)), dtype_name(dtype_));
  return *this;
}

const Array& Array::with_ndim(int64_t wanted) const {
  if (ndim() != wanted) throw_value_error(name_, fmt::format("{} dimensions", wanted), shape_name(shape_));
  return *this;
}

const Array& Array::shaped(const std::vector<int64_t>& shape) const {
  if (shape_ != shape) throw_value_error(name_, shape_name(shape), shape_name(shape_));
  return *this;
}

const Array& Array::shaped_or_flat(const std::vector<int64_t>& shape) const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  if (shape_ != shape && shape_ != std::vector<int64_t>{count})
    throw_value_error(name_, fmt::format("{} or ({})", shape_name(shape), count), shape_name(shape_));
  return *this;
}

const Array& Array::contiguous() const {
  int64_t dense = 1;
  for (size_t axis = shape_.size(); axis-- > 0; dense *= shape_[axis])
    if (shape_[axis] > 1 && stride_[axis] != dense && num_elements() > 0)
      throw_value_error(name_, "a contiguous array",
                        fmt::format("{}, strides ({})", shape_name(shape_), fmt::join(stride_, ", ")));
  return *this;
}

const Array& Array::with_dense_rows() const {
  with_ndim(2);
  const bool adjacent = size(1) <= 1 || stride_[1] == 1;
  if (num_elements() > 0 && (!adjacent || row_stride() < size(1)))
    throw_value_error(name_, "rows of adjacent elements",
                      fmt::format("{}, strides ({})", shape_name(shape_), fmt::join(stride_, ", ")));
  return *this;
}

const Array& Array::on(const Array& other) const {
  if (device_ != other.device_)
    throw_value_error(name_, fmt::format("device {} as {}", device_name(other.device_), other.name_),
                      device_name(device_));
  return *this;
}

const Array& Array::aligned() const {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(data_) % 16;
  if (device_.cuda && offset != 0 && num_elements() > 0)
    throw_value_error(name_, "data aligned to 16 bytes",
                      fmt::format("an address {} bytes past a multiple of 16", offset));
  return *this;
}

std::optional<Array> optional_array(const char* name, nb::handle object, Access access) {
  if (object.is_none()) return std::nullopt;
  return Array(name, object, access);
}

}  // namespace dsv4::py
