// safetensors files: a bounds-checked reader over a memory map, and a streaming writer.
//
// The file is untrusted. Checked before use: header length against the file, JSON (depth, duplicate names), dtype names,
// shape products (overflow), offsets (order, bounds, overlap, holes), element sizes. Nothing is copied: views point into
// the map, which lives as long as the reader. The one exception: a tensor that does not start at a multiple of its element
// size (legal, but writers that sort as align_specs does never make one) is copied, up to kMaxRealignedBytes per file.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/file.h"
#include "tensor/tensor.h"

namespace dsv4 {

constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;  // the limit the format states
constexpr uint64_t kMaxRealignedBytes = 1ull << 30;

constexpr size_t kMaxTensorNameBytes = 1024;

// A name from a file for a message: quoted, control characters escaped, cut when long.
std::string quoted_name(const std::string& name);
// Refuses empty names, names with control characters and names over kMaxTensorNameBytes: they end up in messages.
void check_tensor_name(const std::string& name, const std::string& source);

// What a file's bytes say, checked; views point into the bytes that were parsed and may be misaligned.
struct SafetensorsHeader {
  std::map<std::string, TensorView, std::less<>> tensors;
  std::map<std::string, std::string> metadata;
};
// source: name for messages. Throws bad input naming it and the tensor.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& source);

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return map_.path(); }
  std::span<const std::byte> mapped_bytes() const { return map_.bytes(); }
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }
  const TensorView* find(std::string_view name) const;
  // Throws bad input naming the file if absent.
  const TensorView& at(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  MappedFile map_;
  std::map<std::string, TensorView, std::less<>> tensors_;
  std::map<std::string, std::string> metadata_;
  std::vector<HostBuffer> realigned_;
};

struct TensorSpec {
  std::string name;
  DType dtype;
  Shape shape;
};

// Orders specs by falling element size (otherwise as they were), so that every tensor starts aligned: call it first.
void align_specs(std::vector<TensorSpec>& specs);

// Writes one file: the header is known up front, data is appended tensor by tensor in the order of specs. The file appears
// under its name only after finish() (written to "<path>.partial", synced, renamed). metadata may be empty.
class SafetensorsWriter {
 public:
  SafetensorsWriter(std::string path, const std::vector<TensorSpec>& specs,
                    const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();  // without finish(): removes the partial file
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // Bytes of the next tensor; may be called several times per tensor, but never crosses into the following one.
  void append(const void* data, uint64_t bytes);
  void finish();

  uint64_t data_bytes() const { return data_bytes_; }  // expected in all

 private:
  struct State;
  std::string path_;
  uint64_t data_bytes_ = 0;
  std::unique_ptr<State> state_;
};

// Small files: everything in memory, in the order given (views of 8-byte elements first, or they come back realigned).
void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace dsv4
