// The safetensors writer: header first, then a stream of bytes checked against it.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>

#include "base/check.h"
#include "base/json.h"
#include "base/math.h"
#include "checkpoint/safetensors.h"

namespace dsv4 {
namespace {

[[noreturn]] void throw_write_error(const std::string& path, const char* action) {
  throw_resource("{}: cannot {}: {}", path, action, std::strerror(errno));
}

std::string quoted(const std::string& text) { return Json(text).dump(); }

// Written by hand and not as a Json object: the order of the tensors stays the order of specs. Padded with spaces to a
// multiple of 8, so that the data is aligned.
std::string header_text(const std::vector<TensorSpec>& specs, const std::map<std::string, std::string>& metadata,
                        std::vector<uint64_t>& tensor_ends) {
  std::string text = "{";
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    for (bool first = true; const auto& [key, value] : metadata) {
      text += fmt::format("{}{}:{}", first ? "" : ",", quoted(key), quoted(value));
      first = false;
    }
    text += "}";
  }
  std::set<std::string_view> names;
  uint64_t offset = 0;
  for (const TensorSpec& spec : specs) {
    DSV4_CHECK(names.insert(spec.name).second && spec.name != "__metadata__", "duplicate or reserved name \"{}\"",
               spec.name);
    std::optional<uint64_t> bytes = static_cast<uint64_t>(dtype_bytes(spec.dtype));
    for (int64_t extent : spec.shape) {
      DSV4_CHECK(extent >= 0, "{}: shape {}", spec.name, to_string(spec.shape));
      if (bytes) bytes = checked_mul(*bytes, static_cast<uint64_t>(extent));
    }
    const std::optional<uint64_t> end = bytes ? checked_add(offset, *bytes) : std::nullopt;
    DSV4_CHECK(end.has_value(), "{}: size overflows, shape {}", spec.name, to_string(spec.shape));
    text += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}}", text.size() > 1 ? "," : "",
                        quoted(spec.name), dtype_name(spec.dtype), Json(spec.shape).dump(), offset, *end);
    offset = *end;
    tensor_ends.push_back(offset);
  }
  text += "}";
  text.resize(static_cast<size_t>(round_up(static_cast<int64_t>(text.size()), 8)), ' ');
  return text;
}

}  // namespace

struct SafetensorsWriter::State {
  int fd = -1;
  std::string partial_path;
  std::vector<TensorSpec> specs;
  std::vector<uint64_t> tensor_ends;
  size_t tensor_idx = 0;
  uint64_t written = 0;  // of the data
  bool finished = false;

  ~State() {
    if (fd >= 0) ::close(fd);
    if (!finished && !partial_path.empty()) ::unlink(partial_path.c_str());
  }

  void write_all(const void* data, uint64_t bytes) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t count = ::write(fd, from, std::min<uint64_t>(bytes, 1u << 30));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) throw_write_error(partial_path, "write");
      from += count;
      bytes -= static_cast<uint64_t>(count);
    }
  }
};

void align_specs(std::vector<TensorSpec>& specs) {
  std::stable_sort(specs.begin(), specs.end(), [](const TensorSpec& a, const TensorSpec& b) {
    return dtype_bytes(a.dtype) > dtype_bytes(b.dtype);
  });
}

SafetensorsWriter::SafetensorsWriter(std::string path, const std::vector<TensorSpec>& specs,
                                     const std::map<std::string, std::string>& metadata)
    : path_(std::move(path)), state_(std::make_unique<State>()) {
  state_->specs = specs;
  const std::string header = header_text(specs, metadata, state_->tensor_ends);
  DSV4_CHECK(header.size() <= kMaxSafetensorsHeaderBytes, "{}: header of {} bytes", path_, header.size());
  data_bytes_ = state_->tensor_ends.empty() ? 0 : state_->tensor_ends.back();

  const std::string partial = path_ + ".partial";
  state_->fd = ::open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (state_->fd < 0) throw_write_error(partial, "create");
  state_->partial_path = partial;
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(static_cast<uint64_t>(header.size()) >> (8 * i));
  state_->write_all(length, sizeof(length));
  state_->write_all(header.data(), header.size());
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::append(const void* data, uint64_t bytes) {
  State& state = *state_;
  DSV4_CHECK(!state.finished, "{}: append after finish", path_);
  while (state.tensor_idx < state.tensor_ends.size() && state.written == state.tensor_ends[state.tensor_idx])
    ++state.tensor_idx;
  if (bytes == 0) return;
  DSV4_CHECK(state.tensor_idx < state.tensor_ends.size(), "{}: {} bytes after the last tensor", path_, bytes);
  const uint64_t left = state.tensor_ends[state.tensor_idx] - state.written;
  DSV4_CHECK(bytes <= left, "{}: tensor \"{}\" takes {} more bytes, {} given", path_,
             state.specs[state.tensor_idx].name, left, bytes);
  state.write_all(data, bytes);
  state.written += bytes;
}

void SafetensorsWriter::finish() {
  State& state = *state_;
  DSV4_CHECK(!state.finished && state.written == data_bytes_, "{}: {} of {} bytes written", path_, state.written,
             data_bytes_);
  if (::fsync(state.fd) != 0) throw_write_error(state.partial_path, "sync");
  const int fd = state.fd;
  state.fd = -1;
  if (::close(fd) != 0) throw_write_error(state.partial_path, "close");
  if (::rename(state.partial_path.c_str(), path_.c_str()) != 0) throw_write_error(path_, "replace");
  state.finished = true;
  const auto folder = std::filesystem::path(path_).parent_path();
  sync_path(folder.empty() ? "." : folder.string());
}

void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs.push_back({name, tensor.dtype, tensor.shape});
  SafetensorsWriter writer(path, specs, metadata);
  for (const auto& [name, tensor] : tensors) writer.append(tensor.data, static_cast<uint64_t>(tensor.bytes()));
  writer.finish();
}

}  // namespace dsv4
