// File system side of quantize.
#include "checkpoint/quantize/target_folder.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

// Room for journals, JSON files and what the file system itself needs.
constexpr uint64_t kSpaceReserve = 1 << 20;

bool is_inside(const fs::path& path, const fs::path& folder) {
  const fs::path relative = path.lexically_relative(folder);
  return !relative.empty() && *relative.begin() != "..";  // "." when equal
}

fs::path resolved(const std::string& path) {
  std::error_code error;
  fs::path result = fs::weakly_canonical(fs::absolute(path), error);
  if (error) throw_filesystem(path, "resolve", error);
  if (!result.has_filename()) result = result.parent_path();  // "a/b/"
  return result;
}

// Weights in any format: they are either converted or no part of what was asked for.
bool is_weight_file(const fs::path& name) {
  constexpr std::array<std::string_view, 9> kExtensions{".safetensors", ".bin",  ".pt",      ".pth", ".ckpt",
                                                        ".gguf",        ".onnx", ".msgpack", ".h5"};
  const std::string extension = name.extension().string();
  for (std::string_view weight : kExtensions)
    if (extension == weight) return true;
  return name.string().ends_with(".safetensors.index.json");
}

// A symlink may lead to another file of the folder or into the blobs of a Hugging Face cache. Anywhere else it could bring a
// private file of this machine into a folder that is made to be shared.
void require_inside(const fs::path& link, const std::string& source) {
  std::error_code error;
  const fs::path folder = fs::canonical(source, error);
  const fs::path file = fs::canonical(link, error);
  if (error) throw_filesystem(link.string(), "resolve", error);
  const bool is_cache = folder.parent_path().filename() == "snapshots";
  if (!is_inside(file, folder) && !(is_cache && is_inside(file, folder.parent_path().parent_path() / "blobs")))
    throw_bad_input("{}: symbolic link to a file outside the folder", link.string());
}

bool is_leftover(const std::string& name) {
  return name.ends_with(".partial") || name.find(".tmp-") != std::string::npos;
}

void copy_synced(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::copy_file(from, to, fs::copy_options::overwrite_existing, error);
  if (error) throw_resource("{}: cannot copy to {}: {}", from.string(), to.string(), error.message());
  fs::permissions(to, fs::perms::owner_write, fs::perm_options::add, error);  // so that it can be replaced or removed
  sync_path(to.string());
}

}  // namespace

void check_target_path(const std::string& source, const std::string& target) {
  if (target.empty()) throw_usage("no target folder given");
  const fs::path from = resolved(source);
  const fs::path to = resolved(target);
  if (from == to) throw_usage("{}: the target is the source; the source is never changed", target);
  if (is_inside(to, from)) throw_usage("{}: the target lies inside the source {}", target, source);
  if (is_inside(from, to)) throw_usage("{}: the source {} lies inside the target", target, source);
  const fs::path partial = to.string() + ".partial";
  if (from == partial || is_inside(from, partial))
    throw_usage("{}: the source {} is where the target is made", target, source);
}

TargetFolder::TargetFolder(std::string target) : target_(resolved(target).string()), partial_(target_ + ".partial") {}

TargetFolder::~TargetFolder() {
  if (lock_fd_ >= 0) ::close(lock_fd_);
}

bool TargetFolder::target_exists() const {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(target_, error))) return false;
  return !fs::is_directory(target_, error) || !fs::is_empty(target_, error);
}

void TargetFolder::open() {
  std::error_code error;
  fs::create_directories(partial_, error);
  if (error) throw_resource("{}: cannot create the folder: {}", partial_, error.message());
  lock_fd_ = ::open(partial_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_fd_ < 0) throw_resource("{}: cannot open: {}", partial_, std::strerror(errno));
  if (::flock(lock_fd_, LOCK_EX | LOCK_NB) != 0) throw_resource("{}: another dsv4 quantize is writing here", partial_);
}

void TargetFolder::discard_partial() {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(partial_, error)) {
    fs::remove_all(entry.path(), error);
    if (error) throw_resource("{}: cannot remove: {}", entry.path().string(), error.message());
  }
}

void TargetFolder::require_space(uint64_t bytes) const {
  struct statvfs status {};
  if (::statvfs(partial_.c_str(), &status) != 0) throw_resource("{}: {}", partial_, std::strerror(errno));
  const uint64_t available = static_cast<uint64_t>(status.f_bavail) * status.f_frsize;
  if (bytes + kSpaceReserve > available)
    throw_resource(
        "{}: {} bytes are still to be written, the file system has {} free: free some space and run the same "
        "command again, it continues",
        partial_, bytes, available);
}

void TargetFolder::copy_other_files(const std::string& source, const std::set<std::string>& made) {
  std::error_code error;
  fs::recursive_directory_iterator it(source, error);
  if (error) throw_filesystem(source, "list", error);
  // increment() that fails makes the iterator equal to end: it must not pass for a folder listed to its end.
  const auto next = [&] {
    it.increment(error);
    if (error) throw_filesystem(source, "list", error);
  };
  for (const fs::recursive_directory_iterator end; it != end; next()) {
    const fs::path relative = it->path().lexically_relative(source);
    const std::string name = it->path().filename().string();
    if (name.starts_with('.')) {
      if (it->is_directory(error)) it.disable_recursion_pending();
      continue;
    }
    if (it->is_directory(error)) {
      fs::create_directories(fs::path(partial_) / relative, error);
      if (error) throw_resource("{}: cannot create a folder: {}", partial_, error.message());
      continue;
    }
    if (!it->is_regular_file(error) || is_weight_file(name) || is_leftover(name) || made.contains(relative.string()))
      continue;
    if (it->is_symlink(error)) require_inside(it->path(), source);
    copy_synced(it->path(), fs::path(partial_) / relative);
  }
}

void TargetFolder::finish(bool overwrite) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(partial_, error))
    if (is_leftover(entry.path().filename().string())) fs::remove(entry.path(), error);
  sync_path(partial_);
  if (overwrite && target_exists()) {
    // One step: at any moment either the old or the new folder is there.
    if (::renameat2(AT_FDCWD, partial_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) != 0)
      throw_resource("{}: cannot exchange with {}: {}", partial_, target_, std::strerror(errno));
    fs::remove_all(partial_, error);
    if (error) throw_resource("{}: the old target, cannot remove: {}", partial_, error.message());
  } else if (::rename(partial_.c_str(), target_.c_str()) != 0) {
    throw_resource("{}: cannot rename to {}: {}", partial_, target_, std::strerror(errno));
  }
  sync_path(fs::path(target_).parent_path().string());
}

}  // namespace dsv4
