// Element types of stored tensors, under their safetensors names.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace dsv4 {

enum class DType : uint8_t {
  kBool,
  kU8,
  kI8,
  kI16,
  kU16,
  kI32,
  kU32,
  kI64,
  kU64,
  kF8E4M3,
  kF8E5M2,
  kF8E8M0,
  kF16,
  kBf16,
  kF32,
  kF64
};

int dtype_bytes(DType type);
std::string_view dtype_name(DType type);  // "F8_E4M3", "BF16", ...
std::optional<DType> dtype_from_name(std::string_view name);

}  // namespace dsv4
