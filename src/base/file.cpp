// POSIX implementation of base/file.h.
#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <utility>

#include "base/check.h"

namespace dsv4 {
namespace {

// Without O_NONBLOCK a FIFO under an input's name would block for ever; regular files ignore it.
constexpr int kOpenForReading = O_RDONLY | O_CLOEXEC | O_NONBLOCK;

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

[[noreturn]] void throw_errno(const std::string& path, const char* action) {
  throw_filesystem(path, action, std::error_code(errno, std::generic_category()));
}

uint64_t regular_file_size(int fd, const std::string& path) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) throw_errno(path, "stat");
  if (!S_ISREG(status.st_mode)) throw_bad_input("{}: not a regular file", path);
  return static_cast<uint64_t>(status.st_size);
}

}  // namespace

ErrorKind filesystem_error_kind(const std::error_code& code) {
  switch (code.value()) {  // errno, in both categories that std::filesystem uses
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case EACCES:
    case EPERM:
    case EROFS:
    case ENOMEM:
    case EMFILE:
    case ENFILE:
    case EIO:
      return ErrorKind::kResourceMissing;
    default:
      return ErrorKind::kBadInput;
  }
}

void throw_filesystem(const std::string& path, std::string_view action, const std::error_code& code) {
  throw Error(filesystem_error_kind(code), fmt::format("{}: cannot {}: {}", path, action, code.message()));
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  FileDescriptor file(::open(path.c_str(), kOpenForReading));
  if (file.get() < 0) throw_errno(path, "open");
  size_ = regular_file_size(file.get(), path);
  if (size_ == 0) return;
  void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (mapped == MAP_FAILED) throw_errno(path, "map");
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)), path_(std::move(other.path_)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(path_, other.path_);
  return *this;
}

std::string read_text_file(const std::string& path, uint64_t max_bytes) {
  FileDescriptor file(::open(path.c_str(), kOpenForReading));
  if (file.get() < 0) throw_errno(path, "open");
  const uint64_t size = regular_file_size(file.get(), path);
  if (size > max_bytes) throw_bad_input("{}: file of {} bytes, at most {} are accepted", path, size, max_bytes);
  std::string text(size, '\0');
  uint64_t done = 0;
  while (done < size) {
    const ssize_t count = ::read(file.get(), text.data() + done, size - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_errno(path, "read");
    if (count == 0) throw_bad_input("{}: truncated while reading: {} of {} bytes", path, done, size);
    done += static_cast<uint64_t>(count);
  }
  return text;
}

void sync_path(const std::string& path) {
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) throw_errno(path, "open");
  if (::fsync(file.get()) != 0) throw_errno(path, "sync");
}

void write_file_atomically(const std::string& path, std::string_view content) {
  const std::string temporary = fmt::format("{}.tmp-{}", path, ::getpid());
  try {
    FileDescriptor file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (file.get() < 0) throw_errno(temporary, "create");
    uint64_t done = 0;
    while (done < content.size()) {
      const ssize_t count = ::write(file.get(), content.data() + done, content.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) throw_errno(temporary, "write");
      done += static_cast<uint64_t>(count);
    }
    if (::fsync(file.get()) != 0) throw_errno(temporary, "sync");
    if (::rename(temporary.c_str(), path.c_str()) != 0) throw_errno(path, "replace");
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  const auto folder = std::filesystem::path(path).parent_path();
  sync_path(folder.empty() ? "." : folder.string());
}

bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string_view::npos &&
         name.find('\0') == std::string_view::npos;
}

}  // namespace dsv4
