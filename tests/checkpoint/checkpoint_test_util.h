// Shared by the checkpoint tests: temporary folders, expected errors, hand-made safetensors bytes, small configurations.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/synth.h"

namespace dsv4 {

class TempFolder {
 public:
  TempFolder() {
    // In memory where possible: every file is synced when it is finished, which takes long on a disk.
    const bool in_memory = ::access("/dev/shm", W_OK) == 0;
    std::string pattern = ((in_memory ? std::filesystem::path("/dev/shm") : std::filesystem::temp_directory_path()) /
                           "dsv4-checkpoint-XXXXXX")
                              .string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = pattern;
  }
  ~TempFolder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string operator/(std::string_view name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

// body must throw dsv4::Error of this kind whose text contains every part.
inline void expect_error(ErrorKind kind, std::initializer_list<std::string_view> parts,
                         const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    for (std::string_view part : parts)
      EXPECT_NE(std::string_view(error.what()).find(part), std::string_view::npos)
          << "the message lacks \"" << part << "\": " << error.what();
    return;
  }
  FAIL() << "no error thrown";
}
inline void expect_bad_input(std::initializer_list<std::string_view> parts, const std::function<void()>& body) {
  expect_error(ErrorKind::kBadInput, parts, body);
}

inline std::string safetensors_bytes(std::string_view header, std::string_view data) {
  std::string bytes(8, '\0');
  const uint64_t length = header.size();
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> (8 * i));
  return bytes + std::string(header) + std::string(data);
}

inline void write_bytes(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(file.good()) << path;
}
inline std::string read_bytes(const std::string& path) { return read_text_file(path, 1ull << 32); }

// A model of every mechanism that takes well under a megabyte. Sizes are odd multiples of 16 where they may be.
inline Json tiny_config() {
  Json config = synth_shape_config("demo");
  config.update(Json::parse(R"({
    "vocab_size": 320, "hidden_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "head_dim": 48, "qk_rope_head_dim": 16, "q_lora_rank": 80, "o_lora_rank": 32, "o_groups": 3, "n_routed_experts": 5,
    "num_experts_per_tok": 2, "num_hash_layers": 1, "compress_ratios": [0, 4, 8, 4], "sliding_window": 24,
    "index_n_heads": 3, "index_head_dim": 32, "index_topk": 7, "hc_mult": 3
  })"));
  return config;
}

inline void write_tiny(const std::string& folder, SynthVariant variant, int64_t shard_bytes = 1ll << 30) {
  SynthOptions options;
  options.config = tiny_config();
  options.variant = variant;
  options.shard_bytes = shard_bytes;
  options.num_threads = 2;
  write_synth_checkpoint(folder, options);
}

// The tensors of one file, owned, for tests that change some and write the file back.
class EditableFile {
 public:
  struct Tensor {
    DType dtype;
    Shape shape;
    std::string bytes;
  };
  explicit EditableFile(const std::string& path) : path_(path) {
    SafetensorsFile file(path);
    for (const auto& [name, view] : file.tensors())
      tensors[name] = {view.dtype, view.shape, std::string(reinterpret_cast<const char*>(view.data), view.bytes())};
  }
  void save() const {
    std::vector<TensorSpec> specs;
    for (const auto& [name, tensor] : tensors) specs.push_back({name, tensor.dtype, tensor.shape});
    align_specs(specs);
    SafetensorsWriter writer(path_, specs, {});
    for (const TensorSpec& spec : specs)
      writer.append(tensors.at(spec.name).bytes.data(), tensors.at(spec.name).bytes.size());
    writer.finish();
  }
  std::map<std::string, Tensor> tensors;

 private:
  std::string path_;
};

// open_checkpoint must refuse the folder with a message that names it and contains every part.
inline void expect_unusable(const TempFolder& folder, std::initializer_list<std::string_view> parts) {
  expect_bad_input({folder.path()}, [&] { open_checkpoint(folder.path()); });
  expect_bad_input(parts, [&] { open_checkpoint(folder.path()); });
}

// A tiny checkpoint in one file, with one edit.
class EditedCheckpoint {
 public:
  explicit EditedCheckpoint(SynthVariant variant) { write_tiny(folder_.path(), variant); }
  void edit(const std::function<void(std::map<std::string, EditableFile::Tensor>&)>& change) {
    EditableFile file(folder_ / "model.safetensors");
    change(file.tensors);
    file.save();
  }
  void expect_refused(std::initializer_list<std::string_view> parts) { expect_unusable(folder_, parts); }
  const TempFolder& folder() const { return folder_; }

 private:
  TempFolder folder_;
};

inline std::string float_bytes(float value) { return std::string(reinterpret_cast<const char*>(&value), 4); }

}  // namespace dsv4
