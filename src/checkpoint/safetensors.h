// safetensors files: a bounds-checked reader over a memory map, and a streaming writer.
//
// The file is untrusted. Checked before use: header length against the file, JSON (depth, duplicate names), dtype names,
// shape products (overflow), offsets (order, bounds, overlap, holes), element sizes. Nothing is copied: views point into
// the map, which lives as long as the reader.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "tensor/tensor.h"

namespace dsv4 {

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return map_.path(); }
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }
  const TensorView* find(std::string_view name) const;
  // Throws bad input naming the file if absent.
  const TensorView& at(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  MappedFile map_;
  std::map<std::string, TensorView, std::less<>> tensors_;
  std::map<std::string, std::string> metadata_;
};

struct TensorSpec {
  std::string name;
  DType dtype;
  Shape shape;
};

// Writes one file: the header is known up front, data is appended tensor by tensor in the order of specs. The file appears
// under its name only after finish() (written to "<path>.partial", synced, renamed).
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

// Small files: everything in memory.
void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace dsv4
