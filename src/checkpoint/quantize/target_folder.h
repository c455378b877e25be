// The folder quantize writes: "<target>.partial" while it grows, renamed to the target when everything is in it.
#pragma once

#include <cstdint>
#include <set>
#include <string>

namespace dsv4 {

// Throws usage errors: target equal to source, or one inside the other. Neither needs to exist.
void check_target_path(const std::string& source, const std::string& target);

class TargetFolder {
 public:
  // Does nothing to the file system.
  explicit TargetFolder(std::string target);
  ~TargetFolder();
  TargetFolder(const TargetFolder&) = delete;
  TargetFolder& operator=(const TargetFolder&) = delete;

  const std::string& partial() const { return partial_; }
  std::string partial_file(const std::string& name) const { return partial_ + "/" + name; }
  bool target_exists() const;  // and is not an empty folder

  // Makes the partial folder if it is not there and locks it against a second run. Throws resource missing.
  void open();
  // Removes what open() found. Only for --overwrite.
  void discard_partial();
  // Throws resource missing unless bytes more fit on this file system.
  void require_space(uint64_t bytes) const;
  // Copies the source's other files (tokenizer, licence, sub-folders, ...): not weights, not hidden files, not names in
  // `made`. Returns nothing; throws resource missing.
  void copy_other_files(const std::string& source, const std::set<std::string>& made);
  // Removes leftovers of killed runs, syncs, and renames the partial folder to the target, replacing it if overwrite.
  void finish(bool overwrite);

 private:
  std::string target_;
  std::string partial_;
  int lock_fd_ = -1;
};

}  // namespace dsv4
