// Files: read-only memory maps, whole-file reads with a size limit, atomic replacement, path checks, what their errors mean.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

#include "base/check.h"

namespace dsv4 {

// Missing or malformed is the user's input; no space, no permission or a failing disk is a missing resource.
ErrorKind filesystem_error_kind(const std::error_code& code);
// Throws "path: cannot action: reason" of that kind.
[[noreturn]] void throw_filesystem(const std::string& path, std::string_view action, const std::error_code& code);

// A read-only private map of a whole regular file. Move-only; unmapped on destruction. An empty file has an empty span.
// A file truncated by somebody else while mapped raises SIGBUS on access; size() is what it was when opened.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }

 private:
  const std::byte* data_ = nullptr;
  uint64_t size_ = 0;
  std::string path_;
};

// Throws bad input when the file is missing, not regular, or larger than max_bytes.
std::string read_text_file(const std::string& path, uint64_t max_bytes);

// Writes path.tmp-<pid>, syncs it, renames it over path, syncs the folder. On failure nothing at path changes.
void write_file_atomically(const std::string& path, std::string_view content);

// fsync of an existing file or folder.
void sync_path(const std::string& path);

// True if name is a plain file name: non-empty, no '/', no NUL, not "." or "..".
bool is_plain_file_name(std::string_view name);

}  // namespace dsv4
