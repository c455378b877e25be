// Maps, bounded reads, atomic replacement, plain names.
#include "base/file.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "base/check.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

class File : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "dsv4-base-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  void write(const std::string& name, const std::string& content) const {
    std::ofstream(path(name), std::ios::binary) << content;
  }
  size_t num_files() const {
    size_t count = 0;
    for ([[maybe_unused]] const auto& entry : fs::directory_iterator(folder_)) ++count;
    return count;
  }
  template <class Body>
  static void expect_error(ErrorKind kind, std::string_view part, const Body& body) {
    try {
      body();
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), kind) << error.what();
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
      return;
    }
    FAIL() << "no error thrown";
  }

  fs::path folder_;
};

TEST_F(File, MapShowsTheContentAndMoves) {
  write("a", "hello");
  MappedFile map(path("a"));
  MappedFile moved(std::move(map));
  ASSERT_EQ(moved.size(), 5u);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(moved.bytes().data()), 5), "hello");
  EXPECT_EQ(moved.path(), path("a"));
  EXPECT_EQ(map.size(), 0u);  // NOLINT: moved from on purpose
  moved = MappedFile();
}

TEST_F(File, EmptyFileMapsToAnEmptySpan) {
  write("empty", "");
  const MappedFile map(path("empty"));
  EXPECT_EQ(map.size(), 0u);
  EXPECT_TRUE(map.bytes().empty());
}

TEST_F(File, MissingFilesAndFoldersAreBadInput) {
  expect_error(ErrorKind::kBadInput, "cannot open", [&] { MappedFile map(path("none")); });
  expect_error(ErrorKind::kBadInput, path("none"), [&] { read_text_file(path("none"), 100); });
  expect_error(ErrorKind::kBadInput, "not a regular file", [&] { MappedFile map(folder_.string()); });
  expect_error(ErrorKind::kBadInput, "not a regular file", [&] { read_text_file("/dev/zero", 100); });
}

TEST_F(File, ReadsWholeFilesUpToTheLimit) {
  write("a", std::string("x\0y", 3));
  EXPECT_EQ(read_text_file(path("a"), 3), std::string("x\0y", 3));
  expect_error(ErrorKind::kBadInput, "3 bytes, at most 2", [&] { read_text_file(path("a"), 2); });
}

TEST_F(File, AtomicWriteReplacesAndLeavesNothingElse) {
  write_file_atomically(path("a"), "one");
  write_file_atomically(path("a"), "two");
  write_file_atomically(path("b"), "");
  EXPECT_EQ(read_text_file(path("a"), 100), "two");
  EXPECT_EQ(read_text_file(path("b"), 100), "");
  EXPECT_EQ(num_files(), 2u);
}

TEST_F(File, FailedAtomicWriteChangesNothing) {
  write_file_atomically(path("a"), "old");
  ::signal(SIGXFSZ, SIG_IGN);
  struct rlimit old {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  struct rlimit small = old;
  small.rlim_cur = 10;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  expect_error(ErrorKind::kResourceMissing, "cannot write",
               [&] { write_file_atomically(path("a"), std::string(100, 'x')); });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  EXPECT_EQ(read_text_file(path("a"), 100), "old");
  EXPECT_EQ(num_files(), 1u);
  EXPECT_THROW(write_file_atomically(path("none/a"), "x"), Error);
  fs::create_directory(path("folder"));
  EXPECT_THROW(write_file_atomically(path("folder"), "x"), Error);
  EXPECT_EQ(num_files(), 2u);
}

TEST_F(File, PlainNamesHaveNoPathInThem) {
  for (const char* name : {"a", "model-00001-of-00002.safetensors", "...", ".hidden", "a b"})
    EXPECT_TRUE(is_plain_file_name(name)) << name;
  for (const char* name : {"", ".", "..", "/", "a/b", "/etc/passwd", "../x", "a/"})
    EXPECT_FALSE(is_plain_file_name(name)) << name;
  EXPECT_FALSE(is_plain_file_name(std::string_view("a\0b", 3)));
}

TEST_F(File, PermissionAndSpaceAreMissingResourcesAndTheRestIsBadInput) {
  for (const std::errc code : {std::errc::permission_denied, std::errc::operation_not_permitted,
                               std::errc::read_only_file_system, std::errc::no_space_on_device, std::errc::io_error})
    expect_error(ErrorKind::kResourceMissing,
                 "a/b: cannot open: ", [&] { throw_filesystem("a/b", "open", std::make_error_code(code)); });
  for (const std::errc code :
       {std::errc::no_such_file_or_directory, std::errc::not_a_directory, std::errc::too_many_symbolic_link_levels})
    expect_error(ErrorKind::kBadInput,
                 "a/b: cannot list: ", [&] { throw_filesystem("a/b", "list", std::make_error_code(code)); });
  EXPECT_EQ(filesystem_error_kind({EACCES, std::system_category()}), ErrorKind::kResourceMissing);
}

}  // namespace
}  // namespace dsv4
