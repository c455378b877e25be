// Opening a folder: config, then the weight files and their index, then the inventory. Problems are collected to the end.
#include "checkpoint/checkpoint.h"

#include <filesystem>
#include <set>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/inventory.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr JsonLimits kConfigLimits{.max_bytes = 16u << 20, .max_depth = 32};
constexpr JsonLimits kIndexLimits{.max_bytes = 256u << 20, .max_depth = 8};

bool is_present(const fs::path& path) {
  std::error_code error;
  return fs::exists(fs::symlink_status(path, error));
}

bool is_inside(const fs::path& path, const fs::path& folder) {
  const fs::path relative = path.lexically_relative(folder);
  return !relative.empty() && *relative.begin() != "..";
}

// A symlink may point to another file of the folder, or from .../snapshots/<revision>/ into .../blobs/ as the Hugging
// Face cache lays them out; anywhere else, the folder would name files it was not given.
bool escapes(const fs::path& folder, const fs::path& file) {
  std::error_code error;
  const fs::path real_folder = fs::canonical(folder, error);
  if (error) return false;
  const fs::path real_file = fs::canonical(file, error);
  if (error) return false;  // dangling: opening it says so
  if (is_inside(real_file, real_folder)) return false;
  const bool is_cache = real_folder.parent_path().filename() == "snapshots";
  return !(is_cache && is_inside(real_file, real_folder.parent_path().parent_path() / "blobs"));
}

}  // namespace

class CheckpointReader {
 public:
  explicit CheckpointReader(const std::string& folder) : folder_(folder) { attempt_.checkpoint.folder_ = folder; }

  CheckpointAttempt read() {
    std::error_code error;
    if (!fs::is_directory(folder_, error)) {
      if (filesystem_error_kind(error) == ErrorKind::kResourceMissing)
        throw_filesystem(folder_.string(), "open", error);
      problem("{}: not a folder", folder_.string());
      return std::move(attempt_);
    }
    read_configs();
    const bool complete = read_weights();
    if (!complete)
      problem("{}: tensor inventory not checked: not every weight file could be read", folder_.string());
    else if (attempt_.has_config)
      check_inventory(attempt_.checkpoint, attempt_.problems);
    return std::move(attempt_);
  }

 private:
  template <class... T>
  void problem(fmt::format_string<T...> format, T&&... args) {
    attempt_.problems.add(fmt::format(format, std::forward<T>(args)...));
  }

  // Bad input becomes a problem of the list; anything else (no memory, no permission) ends the attempt.
  template <class Body>
  bool collect(const Body& body) {
    try {
      body();
      return true;
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kBadInput) throw;
      attempt_.problems.add(error.what());
      return false;
    }
  }

  void read_configs() {
    Checkpoint& checkpoint = attempt_.checkpoint;
    const std::string config_path = (folder_ / "config.json").string();
    attempt_.has_config = collect([&] {
      checkpoint.config_json_ = read_json_file(config_path, kConfigLimits);
      checkpoint.config_ = parse_model_config(checkpoint.config_json_, config_path);
    });
    const std::string generation_path = (folder_ / "generation_config.json").string();
    if (is_present(generation_path))
      collect([&] {
        checkpoint.generation_ =
            parse_generation_defaults(read_json_file(generation_path, kConfigLimits), generation_path);
      });
  }

  // False if a file could not be read: the inventory would then report its tensors as missing one by one.
  bool read_weights() {
    const bool has_single = is_present(folder_ / kSingleFile);
    const bool has_index = is_present(folder_ / kIndexFile);
    if (has_single && has_index) {
      problem("{}: has both {} and {}: remove the one that is not meant", folder_.string(), kSingleFile, kIndexFile);
      return false;
    }
    if (has_single) return open_file(kSingleFile);
    if (has_index) return read_shards();
    problem("{}: no weights: neither {} nor {}", folder_.string(), kSingleFile, kIndexFile);
    return false;
  }

  bool open_file(const std::string& name) {
    const fs::path path = folder_ / name;
    if (escapes(folder_, path)) {
      problem("{}: symbolic link to a file outside the folder", path.string());
      return false;
    }
    return collect([&] {
      auto file = std::make_unique<SafetensorsFile>(path.string());
      for (const auto& [tensor_name, tensor] : file->tensors()) {
        const auto [it, inserted] =
            attempt_.checkpoint.by_name_.emplace(tensor_name, Checkpoint::Located{&tensor, file.get()});
        if (!inserted) problem("tensor {} is in both {} and {}", tensor_name, it->second.file->path(), file->path());
      }
      attempt_.checkpoint.files_.push_back(std::move(file));
    });
  }

  bool read_shards() {
    const std::string index_path = (folder_ / kIndexFile).string();
    std::map<std::string, std::string> shard_of;  // tensor -> shard
    if (!collect([&] { shard_of = parse_index(read_json_file(index_path, kIndexLimits), index_path); })) return false;

    std::set<std::string> shards;
    bool complete = true;
    for (const auto& [tensor, shard] : shard_of) {
      if (!shards.insert(shard).second) continue;
      if (!is_plain_file_name(shard)) {
        problem("{}: tensor {} is in {}, expected the name of a file in the folder", index_path, tensor,
                quoted_name(shard));
        complete = false;
      } else if (!is_present(folder_ / shard)) {
        problem("{}: shard {} is missing (it holds {}, among others)", index_path, (folder_ / shard).string(), tensor);
        complete = false;
      } else {
        complete &= open_file(shard);
      }
    }
    if (complete) check_index(shard_of, index_path);
    return complete;
  }

  static std::map<std::string, std::string> parse_index(const Json& index, const std::string& path) {
    const auto map = index.is_object() ? index.find("weight_map") : index.end();
    if (map == index.end() || !map->is_object()) throw_bad_input("{}: no \"weight_map\" object", path);
    std::map<std::string, std::string> shard_of;
    for (const auto& [tensor, shard] : map->items()) {
      check_tensor_name(tensor, path);
      if (!shard.is_string()) throw_bad_input("{}: weight_map entry \"{}\" is not a string", path, tensor);
      shard_of.emplace(tensor, shard.get<std::string>());
    }
    if (shard_of.empty()) throw_bad_input("{}: weight_map is empty", path);
    return shard_of;
  }

  void check_index(const std::map<std::string, std::string>& shard_of, const std::string& index_path) {
    for (const auto& [tensor, shard] : shard_of) {
      const auto found = attempt_.checkpoint.by_name_.find(tensor);
      const std::string listed = (folder_ / shard).string();
      if (found == attempt_.checkpoint.by_name_.end())
        problem("{}: tensor {} is listed in {} but is not there", index_path, tensor, listed);
      else if (found->second.file->path() != listed)
        problem("{}: tensor {} is listed in {} but is in {}", index_path, tensor, listed, found->second.file->path());
    }
    for (const auto& file : attempt_.checkpoint.files_)
      for (const auto& [tensor, view] : file->tensors())
        if (!shard_of.contains(tensor)) problem("{}: tensor {} of {} is not listed", index_path, tensor, file->path());
  }

  fs::path folder_;
  CheckpointAttempt attempt_;
};

const TensorView* Checkpoint::find(std::string_view name) const& {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : it->second.tensor;
}

const TensorView& Checkpoint::at(std::string_view name) const& {
  const TensorView* tensor = find(name);
  if (tensor == nullptr) throw_bad_input("{}: no tensor \"{}\"", folder_, name);
  return *tensor;
}

const std::string& Checkpoint::file_of(std::string_view name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? folder_ : it->second.file->path();
}

CheckpointAttempt try_open_checkpoint(const std::string& folder) { return CheckpointReader(folder).read(); }

Checkpoint open_checkpoint(const std::string& folder) {
  CheckpointAttempt attempt = try_open_checkpoint(folder);
  if (!attempt.problems.empty()) throw_bad_input("{}: cannot use this checkpoint: {}", folder, attempt.problems.text());
  return std::move(attempt.checkpoint);
}

}  // namespace dsv4
