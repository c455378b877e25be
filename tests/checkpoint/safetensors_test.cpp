// The safetensors reader against hostile bytes, and the writer against the reader.
#include "checkpoint/safetensors.h"

#include <sys/stat.h>
#include <unistd.h>

#include <limits>

#include "checkpoint_test_util.h"

namespace dsv4 {
namespace {

SafetensorsHeader parse(const std::string& bytes) {
  return parse_safetensors({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}, "file.safetensors");
}
void expect_refused(const std::string& bytes, std::initializer_list<std::string_view> parts) {
  expect_bad_input({"file.safetensors"}, [&] { parse(bytes); });
  expect_bad_input(parts, [&] { parse(bytes); });
}
std::string with_length(uint64_t length, const std::string& rest) {
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> (8 * i));
  return bytes + rest;
}

constexpr const char* kTwoTensors =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
    R"("b":{"dtype":"U8","shape":[2,2],"data_offsets":[8,12]}})";

TEST(Safetensors, ReadsTensorsAndMetadata) {
  const std::string bytes = safetensors_bytes(kTwoTensors, "12345678abcd");
  const SafetensorsHeader header = parse(bytes);
  ASSERT_EQ(header.tensors.size(), 2u);
  EXPECT_EQ(header.tensors.at("a").dtype, DType::kF32);
  EXPECT_EQ(header.tensors.at("b").shape, (Shape{2, 2}));
  EXPECT_EQ(std::memcmp(header.tensors.at("b").data, "abcd", 4), 0);
  EXPECT_EQ(header.metadata.at("format"), "pt");
}

TEST(Safetensors, EveryProperPrefixOfAFileIsRefused) {
  const std::string bytes = safetensors_bytes(kTwoTensors, "12345678abcd");
  for (size_t length = 0; length < bytes.size(); ++length) {
    SCOPED_TRACE(length);
    expect_refused(bytes.substr(0, length), {});
  }
  expect_refused(bytes + "x", {"12", "13 bytes"});
}

TEST(Safetensors, NoBitFlipGetsAViewOutsideTheFile) {
  const std::string bytes = safetensors_bytes(kTwoTensors, "12345678abcd");
  int accepted = 0;
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    std::string flipped = bytes;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    try {
      for (const auto& [name, tensor] : parse(flipped).tensors) {
        const char* data = reinterpret_cast<const char*>(tensor.data);
        ASSERT_GE(data, flipped.data()) << bit;
        ASSERT_LE(data + tensor.bytes(), flipped.data() + flipped.size()) << bit;
      }
      ++accepted;
    } catch (const Error& error) {
      ASSERT_EQ(error.kind(), ErrorKind::kBadInput) << bit << ": " << error.what();
    }
  }
  EXPECT_GT(accepted, 8 * 12) << "flips in the data and in names are not for the reader to see";
}

TEST(Safetensors, HeaderLengthIsCheckedBeforeUse) {
  expect_refused("", {"0 bytes"});
  expect_refused("1234567", {"7 bytes", "8-byte header length"});
  expect_refused(with_length(0, "{}"), {"header length 0"});
  expect_refused(with_length(3, "{}"), {"header length 3", "only 2 bytes"});
  expect_refused(with_length(1ull << 63, "{}"), {"9223372036854775808", "only 2 bytes"});
  expect_refused(with_length(std::numeric_limits<uint64_t>::max(), "{}"), {"18446744073709551615"});
  expect_refused(with_length(std::numeric_limits<uint64_t>::max() - 7, "{}"), {"header length"});
}

TEST(Safetensors, HeaderMustBeAJsonObject) {
  expect_refused(safetensors_bytes("[]", ""), {"not a JSON object"});
  expect_refused(safetensors_bytes("7", ""), {"not a JSON object"});
  expect_refused(safetensors_bytes("{", ""), {"invalid JSON"});
  expect_refused(safetensors_bytes("{}x", ""), {"invalid JSON"});
  expect_refused(safetensors_bytes("{\"\xff\":1}", ""), {"invalid JSON"});
  expect_refused(safetensors_bytes(std::string(100000, '['), ""), {"nested deeper"});
  std::string deep = "{\"a\":";
  for (int i = 0; i < 50000; ++i) deep += "{\"a\":";
  expect_refused(safetensors_bytes(deep, ""), {"nested deeper"});
}

TEST(Safetensors, DuplicateNamesAreRefused) {
  expect_refused(safetensors_bytes(R"({"twice":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                   R"("twice":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                                   "ab"),
                 {"duplicate", "twice"});
}

std::string one_tensor(std::string_view entry, std::string_view data) {
  return safetensors_bytes("{\"name\":" + std::string(entry) + "}", data);
}

TEST(Safetensors, MalformedEntriesAreRefused) {
  expect_refused(one_tensor("3", ""), {"\"name\"", "not an object"});
  expect_refused(one_tensor(R"({"shape":[1],"data_offsets":[0,1]})", "a"), {"\"name\"", "dtype"});
  expect_refused(one_tensor(R"({"dtype":"U8","data_offsets":[0,1]})", "a"), {"\"name\"", "shape"});
  expect_refused(one_tensor(R"({"dtype":"U8","shape":[1]})", "a"), {"\"name\"", "data_offsets"});
  expect_refused(one_tensor(R"({"dtype":"F4","shape":[1],"data_offsets":[0,1]})", "a"),
                 {"\"name\"", "unknown dtype", "F4"});
  expect_refused(one_tensor(R"({"dtype":5,"shape":[1],"data_offsets":[0,1]})", "a"),
                 {"\"name\"", "unknown dtype", "5"});
  expect_refused(one_tensor(R"({"dtype":"U8","shape":1,"data_offsets":[0,1]})", "a"), {"\"name\"", "not a list"});
  for (const char* extent : {"-1", "1.0", "\"1\"", "null", "9223372036854775808", "1e3"})
    expect_refused(one_tensor(fmt::format(R"({{"dtype":"U8","shape":[{}],"data_offsets":[0,1]}})", extent), "a"),
                   {"\"name\"", "extent"});
  expect_refused(one_tensor(R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]})", "a"),
                 {"\"name\"", "17 dimensions"});
  for (const char* offsets : {"[0]", "[0,1,2]", "[-1,1]", "[0,1.5]", "{}", "[0,\"1\"]", "[0,18446744073709551616]"})
    expect_refused(one_tensor(fmt::format(R"({{"dtype":"U8","shape":[1],"data_offsets":{}}})", offsets), "a"),
                   {"\"name\"", "data_offsets"});
  expect_refused(safetensors_bytes(R"({"__metadata__":[]})", ""), {"__metadata__", "not an object"});
  expect_refused(safetensors_bytes(R"({"__metadata__":{"k":1}})", ""), {"__metadata__", "\"k\"", "not a string"});
}

TEST(Safetensors, NamesThatCannotBePrintedAreRefused) {
  for (const std::string& name : {std::string(), std::string("a\\nb"), std::string("\\u0000"),
                                  std::string("\\u001b[2J"), std::string("\x7f"), std::string(1025, 'n')})
    expect_refused(safetensors_bytes("{\"" + name + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "a"),
                   {"tensor name", "control characters"});
  try {
    parse(safetensors_bytes("{\"" + std::string(1 << 20, 'n') + "\":1}", ""));
    FAIL();
  } catch (const Error& error) {
    EXPECT_LT(std::string_view(error.what()).size(), 500u);
  }
}

TEST(Safetensors, ShapeProductsThatOverflowAreRefused) {
  for (const char* shape : {"[4611686018427387904,4]", "[4294967296,4294967296]", "[9223372036854775807,3]",
                            "[4611686018427387904,4,0]", "[9223372036854775807]"})
    expect_refused(one_tensor(fmt::format(R"({{"dtype":"F32","shape":{},"data_offsets":[0,4]}})", shape), "abcd"),
                   {"\"name\"", "overflows"});
}

TEST(Safetensors, OffsetsMustTileTheDataExactly) {
  const auto two = [](const char* a, const char* b) {
    return safetensors_bytes(fmt::format(R"({{"aa":{{"dtype":"U8","shape":[4],"data_offsets":{}}},)"
                                         R"("bb":{{"dtype":"U8","shape":[4],"data_offsets":{}}}}})",
                                         a, b),
                             "12345678");
  };
  EXPECT_EQ(parse(two("[4,8]", "[0,4]")).tensors.size(), 2u);
  expect_refused(two("[0,4]", "[3,7]"), {"\"aa\"", "\"bb\"", "overlap"});
  expect_refused(two("[0,4]", "[0,4]"), {"\"aa\"", "\"bb\"", "overlap"});
  expect_refused(two("[4,0]", "[4,8]"), {"\"aa\"", "reversed"});
  expect_refused(two("[0,4]", "[5,9]"), {"\"bb\"", "9", "8 bytes"});
  expect_refused(two("[0,4]", "[18446744073709551612,18446744073709551615]"), {"\"bb\"", "18446744073709551615"});
  expect_refused(two("[0,4]", "[4,7]"), {"\"bb\"", "3 bytes", "needs 4"});
  expect_refused(safetensors_bytes(R"({"aa":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", "123456"),
                 {"hole", "\"aa\""});
  expect_refused(safetensors_bytes(R"({"aa":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "123456"),
                 {"offset 4", "6 bytes"});
  expect_refused(safetensors_bytes("{}", "1"), {"1 bytes"});
}

TEST(Safetensors, EmptyFilesAndEmptyTensorsAreLegal) {
  EXPECT_TRUE(parse(safetensors_bytes("{}", "")).tensors.empty());
  const std::string bytes = one_tensor(R"({"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]})", "");
  EXPECT_EQ(parse(bytes).tensors.at("name").bytes(), 0);
}

TEST(Safetensors, ScalarsHaveOneElement) {
  const std::string bytes = one_tensor(R"({"dtype":"F32","shape":[],"data_offsets":[0,4]})", "abcd");
  EXPECT_EQ(parse(bytes).tensors.at("name").elements(), 1);
}

TEST(Safetensors, MisalignedTensorsAreRealigned) {
  TempFolder folder;
  const int64_t value = 0x0102030405060708;
  std::string data = "x";
  data.append(reinterpret_cast<const char*>(&value), 8);
  write_bytes(folder / "m.safetensors", safetensors_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                                          R"("b":{"dtype":"I64","shape":[1],"data_offsets":[1,9]}})",
                                                          data));
  const SafetensorsFile file(folder / "m.safetensors");
  const TensorView& tensor = file.at("b");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data) % 8, 0u);
  EXPECT_EQ(*tensor.as<int64_t>(), value);
}

TEST(Safetensors, FilesThatCannotBeReadNameTheirPath) {
  TempFolder folder;
  expect_bad_input({folder / "absent.safetensors", "cannot open"},
                   [&] { SafetensorsFile file(folder / "absent.safetensors"); });
  expect_bad_input({folder.path(), "not a regular file"}, [&] { SafetensorsFile file(folder.path()); });
  write_bytes(folder / "empty.safetensors", "");
  expect_bad_input({folder / "empty.safetensors", "0 bytes"},
                   [&] { SafetensorsFile file(folder / "empty.safetensors"); });
  write_bytes(folder / "ok.safetensors", safetensors_bytes("{}", ""));
  const SafetensorsFile file(folder / "ok.safetensors");
  expect_bad_input({folder / "ok.safetensors", "\"nothing\""}, [&] { file.at("nothing"); });
}

TEST(Safetensors, WhatIsWrittenIsRead) {
  TempFolder folder;
  const std::vector<int64_t> ids{1, -2, 3};
  const std::vector<float> values{0.5f, -1.5f};
  const std::string name = "weird \"name\" \\ \xe2\x82\xac";
  write_safetensors(folder / "f.safetensors",
                    {{"ids", {DType::kI64, {3}, reinterpret_cast<const std::byte*>(ids.data())}},
                     {name, {DType::kF32, {2, 1}, reinterpret_cast<const std::byte*>(values.data())}},
                     {"scalar", {DType::kF32, {}, reinterpret_cast<const std::byte*>(values.data())}},
                     {"none", {DType::kBf16, {0, 4}, nullptr}}},
                    {{"key", "value\t"}});
  const SafetensorsFile file(folder / "f.safetensors");
  EXPECT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.metadata().at("key"), "value\t");
  EXPECT_EQ(std::memcmp(file.at("ids").data, ids.data(), 24), 0);
  EXPECT_EQ(file.at(name).shape, (Shape{2, 1}));
  EXPECT_EQ(*file.at("scalar").as<float>(), 0.5f);
  EXPECT_EQ(file.at("none").shape, (Shape{0, 4}));
  EXPECT_EQ(file.find("missing"), nullptr);
}

TEST(Safetensors, WriterStreamsATensorInPieces) {
  TempFolder folder;
  SafetensorsWriter writer(folder / "s.safetensors", {{"a", DType::kU8, {6}}, {"b", DType::kU8, {2}}}, {});
  EXPECT_EQ(writer.data_bytes(), 8u);
  writer.append("12", 2);
  writer.append("3456", 4);
  EXPECT_FALSE(std::filesystem::exists(folder / "s.safetensors"));
  writer.append("78", 2);
  writer.finish();
  const SafetensorsFile file(folder / "s.safetensors");
  EXPECT_EQ(std::memcmp(file.at("a").data, "123456", 6), 0);
  EXPECT_EQ(std::memcmp(file.at("b").data, "78", 2), 0);
  EXPECT_FALSE(std::filesystem::exists(folder / "s.safetensors.partial"));
}

TEST(Safetensors, WriterRefusesMisuse) {
  TempFolder folder;
  const std::string path = folder / "s.safetensors";
  {
    SafetensorsWriter writer(path, {{"first", DType::kU8, {2}}, {"second", DType::kU8, {2}}}, {});
    expect_error(ErrorKind::kInternal, {"first", "2 more bytes", "3 given"}, [&] { writer.append("123", 3); });
    writer.append("12", 2);
    expect_error(ErrorKind::kInternal, {"2 of 4 bytes"}, [&] { writer.finish(); });
    writer.append("34", 2);
    expect_error(ErrorKind::kInternal, {"after the last tensor"}, [&] { writer.append("5", 1); });
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path())) << "an unfinished writer must leave nothing";
  expect_error(ErrorKind::kInternal, {"twice"}, [&] {
    SafetensorsWriter(path, {{"twice", DType::kU8, {1}}, {"twice", DType::kU8, {1}}}, {});
  });
  expect_error(ErrorKind::kInternal, {"big", "overflows"}, [&] {
    SafetensorsWriter(path, {{"big", DType::kF32, {int64_t{1} << 40, int64_t{1} << 40}}}, {});
  });
}

TEST(Safetensors, WriterReportsAFolderThatCannotBeWritten) {
  TempFolder folder;
  expect_error(ErrorKind::kResourceMissing, {folder / "none/s.safetensors.partial", "cannot create"},
               [&] { SafetensorsWriter(folder / "none/s.safetensors", {}, {}); });
}

TEST(Safetensors, AlignedSpecsComeBackWithoutCopies) {
  TempFolder folder;
  std::vector<TensorSpec> specs{{"byte", DType::kU8, {3}},
                                {"half", DType::kBf16, {1}},
                                {"long", DType::kI64, {1}},
                                {"byte2", DType::kI8, {1}},
                                {"float", DType::kF32, {3}}};
  align_specs(specs);
  std::vector<std::string> order;
  for (const TensorSpec& spec : specs) order.push_back(spec.name);
  EXPECT_EQ(order, (std::vector<std::string>{"long", "float", "half", "byte", "byte2"}));
  SafetensorsWriter writer(folder / "s.safetensors", specs, {});
  const std::string zeros(64, '\0');
  for (const TensorSpec& spec : specs) writer.append(zeros.data(), num_elements(spec.shape) * dtype_bytes(spec.dtype));
  writer.finish();
  const SafetensorsFile file(folder / "s.safetensors");
  for (const auto& [name, tensor] : file.tensors()) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data) % dtype_bytes(tensor.dtype), 0u) << name;
    EXPECT_GE(tensor.data, file.mapped_bytes().data()) << name;
    EXPECT_LE(tensor.data + tensor.bytes(), file.mapped_bytes().data() + file.mapped_bytes().size()) << name;
  }
}

}  // namespace
}  // namespace dsv4
