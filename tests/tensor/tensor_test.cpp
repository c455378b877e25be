// Element types, shapes, views and owned host memory.
#include "tensor/tensor.h"

#include <gtest/gtest.h>

#include <cstring>
#include <set>
#include <utility>

#include "base/check.h"

namespace dsv4 {
namespace {

constexpr DType kAll[] = {DType::kBool, DType::kU8,   DType::kI8,  DType::kI16,    DType::kU16,    DType::kI32,
                          DType::kU32,  DType::kI64,  DType::kU64, DType::kF8E4M3, DType::kF8E5M2, DType::kF8E8M0,
                          DType::kF16,  DType::kBf16, DType::kF32, DType::kF64};

TEST(DType, NamesAreThoseOfSafetensorsAndReadBack) {
  std::set<std::string_view> names;
  for (const DType type : kAll) {
    EXPECT_TRUE(names.insert(dtype_name(type)).second) << dtype_name(type);
    ASSERT_TRUE(dtype_from_name(dtype_name(type)).has_value());
    EXPECT_EQ(*dtype_from_name(dtype_name(type)), type);
  }
  EXPECT_EQ(dtype_name(DType::kF8E4M3), "F8_E4M3");
  EXPECT_EQ(dtype_name(DType::kF8E8M0), "F8_E8M0");
  EXPECT_EQ(dtype_name(DType::kBf16), "BF16");
  EXPECT_EQ(dtype_name(DType::kI64), "I64");
  EXPECT_EQ(dtype_name(DType::kBool), "BOOL");
}

TEST(DType, SizesMatchTheNames) {
  for (const DType type : kAll) {
    const std::string name(dtype_name(type));
    int expected = 1;
    if (name.ends_with("16")) expected = 2;
    if (name.ends_with("32")) expected = 4;
    if (name.ends_with("64")) expected = 8;
    EXPECT_EQ(dtype_bytes(type), expected) << name;
  }
}

TEST(DType, UnknownNamesAreNotGuessed) {
  for (const char* name : {"", "f32", "F32 ", "F8", "F8_E4M3FN", "FLOAT", "BF16x"})
    EXPECT_FALSE(dtype_from_name(name)) << name;
}

TEST(Shape, PrintsAndCounts) {
  EXPECT_EQ(to_string(Shape{4096, 256}), "[4096, 256]");
  EXPECT_EQ(to_string(Shape{}), "[]");
  EXPECT_EQ(num_elements({}), 1);
  EXPECT_EQ(num_elements({3, 0, 5}), 0);
  EXPECT_EQ(num_elements({1ll << 31, 1ll << 30}), 1ll << 61);
}

TEST(TensorView, BytesFollowTheElementType) {
  TensorView view{DType::kBf16, {3, 5}, nullptr};
  EXPECT_EQ(view.elements(), 15);
  EXPECT_EQ(view.bytes(), 30);
  view.dtype = DType::kF64;
  EXPECT_EQ(view.bytes(), 120);
}

TEST(HostBuffer, IsAlignedWritableAndMovable) {
  for (const int64_t bytes : {0, 1, 63, 64, 65, 1 << 20}) {
    HostBuffer buffer(bytes);
    ASSERT_NE(buffer.data(), nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0u);
    EXPECT_EQ(buffer.bytes(), bytes);
    std::memset(buffer.data(), 0x5a, static_cast<size_t>(bytes));
    const std::byte* where = buffer.data();
    HostBuffer moved = std::move(buffer);
    EXPECT_EQ(moved.data(), where);
    if (bytes > 0) {
      EXPECT_EQ(moved.as<uint8_t>()[bytes - 1], 0x5a);
    }
  }
  EXPECT_EQ(HostBuffer().data(), nullptr);
}

TEST(HostBuffer, ImpossibleSizesAreErrors) {
  EXPECT_THROW(HostBuffer(-1), Error);
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "AddressSanitizer ends the process on an allocation this large";
#endif
  try {
    HostBuffer huge(int64_t{1} << 62);
    FAIL() << "allocated 2^62 bytes";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kResourceMissing);
    EXPECT_NE(std::string(error.what()).find("4611686018427387904"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace dsv4
