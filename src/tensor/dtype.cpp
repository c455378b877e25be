// The table of element types.
#include "tensor/dtype.h"

#include <array>

namespace dsv4 {
namespace {
struct Row {
  DType type;
  std::string_view name;
  int bytes;
};
constexpr std::array kTable{
    Row{DType::kBool, "BOOL", 1},      Row{DType::kU8, "U8", 1},          Row{DType::kI8, "I8", 1},
    Row{DType::kI16, "I16", 2},        Row{DType::kU16, "U16", 2},        Row{DType::kI32, "I32", 4},
    Row{DType::kU32, "U32", 4},        Row{DType::kI64, "I64", 8},        Row{DType::kU64, "U64", 8},
    Row{DType::kF8E4M3, "F8_E4M3", 1}, Row{DType::kF8E5M2, "F8_E5M2", 1}, Row{DType::kF8E8M0, "F8_E8M0", 1},
    Row{DType::kF16, "F16", 2},        Row{DType::kBf16, "BF16", 2},      Row{DType::kF32, "F32", 4},
    Row{DType::kF64, "F64", 8},
};
}  // namespace

int dtype_bytes(DType type) { return kTable[static_cast<size_t>(type)].bytes; }
std::string_view dtype_name(DType type) { return kTable[static_cast<size_t>(type)].name; }
std::optional<DType> dtype_from_name(std::string_view name) {
  for (const Row& row : kTable)
    if (row.name == name) return row.type;
  return std::nullopt;
}

}  // namespace dsv4
