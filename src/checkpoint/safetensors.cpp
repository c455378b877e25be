// The safetensors reader: every number in the header is checked before a view is made from it.
#include "checkpoint/safetensors.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "base/check.h"
#include "base/json.h"
#include "base/math.h"

namespace dsv4 {
namespace {

constexpr int kMaxRank = 16;
constexpr uint64_t kLengthBytes = 8;
constexpr std::string_view kMetadataKey = "__metadata__";

struct Placed {
  const std::string* name;
  uint64_t begin;
  uint64_t end;
};

// A value for a message, cut when long.
std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

std::optional<uint64_t> as_unsigned(const Json& value) {
  // nlohmann stores every non-negative integer literal that fits 64 bits as unsigned; all else is a wrong type here.
  if (!value.is_number_unsigned()) return std::nullopt;
  return value.get<uint64_t>();
}

const Json& member(const Json& entry, const char* key, const std::string& source, const std::string& name) {
  const auto it = entry.find(key);
  if (it == entry.end()) throw_bad_input("{}: tensor \"{}\" has no \"{}\"", source, name, key);
  return *it;
}

Shape parse_shape(const Json& value, const std::string& source, const std::string& name) {
  if (!value.is_array()) throw_bad_input("{}: shape of tensor \"{}\" is not a list: {}", source, name, shown(value));
  if (value.size() > kMaxRank)
    throw_bad_input("{}: tensor \"{}\" has {} dimensions, at most {} are accepted", source, name, value.size(),
                    kMaxRank);
  Shape shape;
  for (const Json& extent : value) {
    const auto size = as_unsigned(extent);
    if (!size || *size > static_cast<uint64_t>(INT64_MAX))
      throw_bad_input("{}: shape of tensor \"{}\" has the extent {}, expected an integer from 0 to 2^63-1", source,
                      name, shown(extent));
    shape.push_back(static_cast<int64_t>(*size));
  }
  return shape;
}

uint64_t checked_bytes(const Shape& shape, DType dtype, const std::string& source, const std::string& name) {
  std::optional<uint64_t> bytes = 1;
  for (int64_t extent : shape)
    if (bytes) bytes = checked_mul(*bytes, static_cast<uint64_t>(extent));
  if (bytes) bytes = checked_mul(*bytes, static_cast<uint64_t>(dtype_bytes(dtype)));
  if (!bytes || *bytes > static_cast<uint64_t>(INT64_MAX))
    throw_bad_input("{}: size of tensor \"{}\", shape {} of {}, overflows 63 bits", source, name, to_string(shape),
                    dtype_name(dtype));
  return *bytes;
}

void parse_metadata(const Json& value, const std::string& source, std::map<std::string, std::string>& metadata) {
  if (!value.is_object()) throw_bad_input("{}: {} is not an object", source, kMetadataKey);
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) throw_bad_input("{}: {} entry {} is not a string", source, kMetadataKey, quoted_name(key));
    metadata.emplace(key, text.get<std::string>());
  }
}

// The data must be tiled exactly: no overlap, no hole, nothing after the last tensor.
void check_tiling(std::vector<Placed>& placed, uint64_t data_bytes, const std::string& source) {
  std::sort(placed.begin(), placed.end(),
            [](const Placed& a, const Placed& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  uint64_t expected = 0;
  const std::string* previous = nullptr;
  for (const Placed& tensor : placed) {
    if (tensor.begin < expected)
      throw_bad_input("{}: tensors \"{}\" and \"{}\" overlap: the second begins at offset {}, the first ends at {}",
                      source, *previous, *tensor.name, tensor.begin, expected);
    if (tensor.begin > expected)
      throw_bad_input("{}: hole in the data before tensor \"{}\": offsets {} to {} belong to no tensor", source,
                      *tensor.name, expected, tensor.begin);
    expected = tensor.end;
    previous = tensor.name;
  }
  if (expected != data_bytes)
    throw_bad_input("{}: the tensors end at offset {} but the file holds {} bytes of data", source, expected,
                    data_bytes);
}

}  // namespace

std::string quoted_name(const std::string& name) {
  std::string text = Json(name.substr(0, 200)).dump(-1, ' ', false, Json::error_handler_t::replace);
  if (name.size() > 200) text += fmt::format("... ({} bytes)", name.size());
  return text;
}

void check_tensor_name(const std::string& name, const std::string& source) {
  const bool has_control = std::any_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
  if (name.empty() || has_control || name.size() > kMaxTensorNameBytes)
    throw_bad_input("{}: tensor name {}: expected 1 to {} bytes without control characters", source, quoted_name(name),
                    kMaxTensorNameBytes);
}

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& source) {
  if (file.size() < kLengthBytes)
    throw_bad_input("{}: file of {} bytes is too short for the 8-byte header length", source, file.size());
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) header_bytes |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  const uint64_t after_length = file.size() - kLengthBytes;
  if (header_bytes == 0) throw_bad_input("{}: header length 0", source);
  if (header_bytes > after_length)
    throw_bad_input("{}: header length {} but only {} bytes follow it (truncated, or not a safetensors file)", source,
                    header_bytes, after_length);
  if (header_bytes > kMaxSafetensorsHeaderBytes)
    throw_bad_input("{}: header length {}, at most {} is accepted", source, header_bytes, kMaxSafetensorsHeaderBytes);

  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, header_bytes);
  const Json root = parse_json(text, source + " (header)", {.max_bytes = kMaxSafetensorsHeaderBytes, .max_depth = 4});
  if (!root.is_object()) throw_bad_input("{}: header is not a JSON object", source);

  const std::byte* data = file.data() + kLengthBytes + header_bytes;
  const uint64_t data_bytes = after_length - header_bytes;
  SafetensorsHeader header;
  std::vector<Placed> placed;
  for (const auto& [name, entry] : root.items()) {
    if (name == kMetadataKey) {
      parse_metadata(entry, source, header.metadata);
      continue;
    }
    check_tensor_name(name, source);
    if (!entry.is_object()) throw_bad_input("{}: header entry of tensor \"{}\" is not an object", source, name);
    const Json& dtype_json = member(entry, "dtype", source, name);
    const auto dtype =
        dtype_json.is_string() ? dtype_from_name(dtype_json.get_ref<const std::string&>()) : std::nullopt;
    if (!dtype) throw_bad_input("{}: tensor \"{}\" has the unknown dtype {}", source, name, shown(dtype_json));
    Shape shape = parse_shape(member(entry, "shape", source, name), source, name);
    const uint64_t bytes = checked_bytes(shape, *dtype, source, name);

    const Json& offsets = member(entry, "data_offsets", source, name);
    const auto begin = offsets.is_array() && offsets.size() == 2 ? as_unsigned(offsets[0]) : std::nullopt;
    const auto end = offsets.is_array() && offsets.size() == 2 ? as_unsigned(offsets[1]) : std::nullopt;
    if (!begin || !end)
      throw_bad_input("{}: data_offsets of tensor \"{}\" are {}, expected two non-negative integers", source, name,
                      shown(offsets));
    if (*begin > *end)
      throw_bad_input("{}: data_offsets of tensor \"{}\" are reversed: {}", source, name, shown(offsets));
    if (*end > data_bytes)
      throw_bad_input("{}: tensor \"{}\" ends at offset {} but the file holds {} bytes of data (truncated?)", source,
                      name, *end, data_bytes);
    if (*end - *begin != bytes)
      throw_bad_input("{}: tensor \"{}\" has {} bytes of data, shape {} of {} needs {}", source, name, *end - *begin,
                      to_string(shape), dtype_name(*dtype), bytes);

    const auto [it, inserted] = header.tensors.emplace(name, TensorView{*dtype, std::move(shape), data + *begin});
    DSV4_CHECK(inserted, "{}: {}", source, name);  // parse_json refused duplicates
    placed.push_back({&it->first, *begin, *end});
  }
  check_tiling(placed, data_bytes, source);
  return header;
}

SafetensorsFile::SafetensorsFile(const std::string& path) : map_(path) {
  SafetensorsHeader header = parse_safetensors(map_.bytes(), path);
  tensors_ = std::move(header.tensors);
  metadata_ = std::move(header.metadata);

  uint64_t realigned_bytes = 0;
  for (auto& [name, tensor] : tensors_) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.data);
    if (tensor.bytes() == 0 || address % static_cast<uintptr_t>(dtype_bytes(tensor.dtype)) == 0) continue;
    realigned_bytes += static_cast<uint64_t>(tensor.bytes());
    if (realigned_bytes > kMaxRealignedBytes)
      throw_bad_input(
          "{}: tensor \"{}\" ({}) does not start at a multiple of its element size, and more than {} bytes of this "
          "file do "
          "not: rewrite the file with its tensors aligned",
          path, name, dtype_name(tensor.dtype), kMaxRealignedBytes);
    HostBuffer copy(tensor.bytes());
    std::memcpy(copy.data(), tensor.data, static_cast<size_t>(tensor.bytes()));
    tensor.data = copy.data();
    realigned_.push_back(std::move(copy));
  }
}

const TensorView* SafetensorsFile::find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const TensorView& SafetensorsFile::at(std::string_view name) const {
  const TensorView* tensor = find(name);
  if (tensor == nullptr) throw_bad_input("{}: no tensor \"{}\"", path(), name);
  return *tensor;
}

}  // namespace dsv4
