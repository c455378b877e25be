// How quantize runs: threads, shards, interruption and resumption, existing targets, refused paths, memory of the source.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <map>

#include "checkpoint/checkpoint.h"
#include "checkpoint/checkpoint_test_util.h"
#include "checkpoint/quantize/quantize.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

// Relative path -> content of every file below a folder.
std::map<std::string, std::string> content_of(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file())
      files[entry.path().lexically_relative(folder).string()] = read_bytes(entry.path().string());
  return files;
}

struct Interrupted {};

class Run : public ::testing::Test {
 protected:
  void SetUp() override {
    write_tiny(source_, SynthVariant::kBf16);
    options_.source = source_;
    options_.target = target_;
    options_.dense = DenseFormat::kNvfp4;
    options_.num_threads = 2;
    options_.shard_bytes = 120000;
  }

  // Runs until the progress callback has been called `calls` times, then leaves by an exception.
  bool interrupt_after(int calls, const QuantizeOptions& options) {
    try {
      quantize_checkpoint(options, [&](const QuantizeProgress&) {
        if (--calls < 0) throw Interrupted();
      });
    } catch (const Interrupted&) {
      return true;
    }
    return false;
  }

  std::map<std::string, std::string> expected() {
    QuantizeOptions options = options_;
    options.target = folder_ / "expected";
    quantize_checkpoint(options);
    return content_of(options.target);
  }

  TempFolder folder_;
  std::string source_ = folder_ / "source";
  std::string target_ = folder_ / "target";
  QuantizeOptions options_;
};

TEST_F(Run, BytesDoNotDependOnThreads) {
  const auto two = expected();
  EXPECT_GT(two.size(), 6u);
  for (const int num_threads : {1, 5}) {
    options_.num_threads = num_threads;
    options_.target = folder_ / fmt::format("threads{}", num_threads);
    quantize_checkpoint(options_);
    EXPECT_EQ(content_of(options_.target), two);
  }
}

TEST_F(Run, ShardsHoldTheSameTensorsAsOneFile) {
  quantize_checkpoint(options_);
  options_.target = folder_ / "one";
  options_.shard_bytes = 1ull << 40;
  quantize_checkpoint(options_);
  const Checkpoint many = open_checkpoint(target_);
  const Checkpoint one = open_checkpoint(options_.target);
  EXPECT_GT(many.files().size(), 3u);
  ASSERT_EQ(one.files().size(), 1u);
  EXPECT_FALSE(fs::exists(options_.target + "/model.safetensors.index.json"));
  size_t num_tensors = 0;
  for (const auto& file : many.files()) {
    num_tensors += file->tensors().size();
    for (const auto& [name, view] : file->tensors()) {
      const TensorView& other = one.at(name);
      ASSERT_EQ(view.dtype, other.dtype) << name;
      ASSERT_EQ(view.shape, other.shape) << name;
      ASSERT_EQ(std::memcmp(view.data, other.data, static_cast<size_t>(view.bytes())), 0) << name;
      // Aligned in the file: nothing had to be copied on opening.
      EXPECT_EQ(reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(dtype_bytes(view.dtype)), 0u) << name;
      const auto map = file->mapped_bytes();
      EXPECT_TRUE(view.data >= map.data() && view.data <= map.data() + map.size()) << name << " was realigned";
    }
  }
  EXPECT_EQ(num_tensors, one.files()[0]->tensors().size());
}

TEST_F(Run, InterruptedAnywhereItContinuesToTheSameBytes) {
  const auto want = expected();
  int calls = 0;
  for (int step = 3; interrupt_after(calls, options_); calls = step, step += 37) {
    EXPECT_FALSE(fs::exists(target_)) << "a half-made target";
  }
  EXPECT_GT(calls, 100);
  EXPECT_FALSE(fs::exists(target_ + ".partial"));
  EXPECT_EQ(content_of(target_), want);
}

TEST_F(Run, FinishedShardsAreKeptUnlessTheyChanged) {
  const auto want = expected();
  ASSERT_TRUE(interrupt_after(300, options_));
  std::vector<std::string> shards;
  for (const auto& entry : fs::directory_iterator(target_ + ".partial"))
    if (entry.path().extension() == ".safetensors") shards.push_back(entry.path().string());
  ASSERT_GE(shards.size(), 3u);
  std::sort(shards.begin(), shards.end());
  // One byte flipped, one truncated, one gone.
  std::string bytes = read_bytes(shards[0]);
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  write_bytes(shards[0], bytes);
  fs::resize_file(shards[1], fs::file_size(shards[1]) - 1);
  fs::remove(shards[2]);
  const QuantizeReport report = quantize_checkpoint(options_);
  EXPECT_EQ(report.num_resumed_shards, static_cast<int>(shards.size()) - 3);
  EXPECT_EQ(content_of(target_), want);
}

TEST_F(Run, StatisticsOfAResumedRunAreThoseOfAWholeRun) {
  QuantizeOptions whole = options_;
  whole.target = folder_ / "whole";
  const QuantizeReport want = quantize_checkpoint(whole);
  ASSERT_TRUE(interrupt_after(300, options_));
  const QuantizeReport found = quantize_checkpoint(options_);
  EXPECT_GT(found.num_resumed_shards, 0);
  ASSERT_EQ(found.kinds.size(), want.kinds.size());
  for (size_t i = 0; i < want.kinds.size(); ++i) {
    EXPECT_EQ(found.kinds[i].kind, want.kinds[i].kind);
    EXPECT_EQ(found.kinds[i].num_elements, want.kinds[i].num_elements);
    EXPECT_EQ(found.kinds[i].error_sq, want.kinds[i].error_sq);
    EXPECT_EQ(found.kinds[i].target_bytes, want.kinds[i].target_bytes);
  }
}

TEST_F(Run, OtherOptionsDoNotContinueAPartialRun) {
  ASSERT_TRUE(interrupt_after(300, options_));
  QuantizeOptions other = options_;
  other.scale = ScaleRule::kMse;
  expect_bad_input({target_ + ".partial", "--scale modelopt, not mse"}, [&] { quantize_checkpoint(other); });
  other.overwrite = true;
  EXPECT_EQ(quantize_checkpoint(other).num_resumed_shards, 0);
}

TEST_F(Run, AChangedSourceDoesNotContinueAPartialRun) {
  ASSERT_TRUE(interrupt_after(300, options_));
  std::string bytes = read_bytes(source_ + "/model.safetensors");
  bytes.back() = static_cast<char>(bytes.back() ^ 1);  // same size, same header
  write_bytes(source_ + "/model.safetensors", bytes);
  fs::last_write_time(source_ + "/model.safetensors", fs::file_time_type::clock::now() + std::chrono::seconds(5));
  expect_bad_input({"source files modified"}, [&] { quantize_checkpoint(options_); });
}

TEST_F(Run, TheSameRequestAgainFindsItsWorkDone) {
  quantize_checkpoint(options_);
  const auto before = content_of(target_);
  const QuantizeReport report = quantize_checkpoint(options_);
  EXPECT_TRUE(report.already_complete);
  EXPECT_GT(report.kinds.size(), 3u);
  EXPECT_EQ(content_of(target_), before);
  const std::string shard = target_ + "/model-00001-of-" + fmt::format("{:05}.safetensors", report.num_shards);
  std::string bytes = read_bytes(shard);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  write_bytes(shard, bytes);
  expect_bad_input({"changed since it was made"}, [&] { quantize_checkpoint(options_); });
}

TEST_F(Run, AnExistingTargetIsReplacedOnlyWhenAsked) {
  fs::create_directories(target_);
  write_bytes(target_ + "/precious", "data");
  expect_bad_input({target_, "--overwrite"}, [&] { quantize_checkpoint(options_); });
  EXPECT_EQ(read_bytes(target_ + "/precious"), "data");
  options_.overwrite = true;
  quantize_checkpoint(options_);
  EXPECT_FALSE(fs::exists(target_ + "/precious"));
  EXPECT_FALSE(fs::exists(target_ + ".partial"));
  open_checkpoint(target_);
}

TEST_F(Run, AForeignPartialFolderIsLeftAlone) {
  fs::create_directories(target_ + ".partial");
  write_bytes(target_ + ".partial/precious", "data");
  expect_bad_input({target_ + ".partial", "no unfinished run"}, [&] { quantize_checkpoint(options_); });
  EXPECT_EQ(read_bytes(target_ + ".partial/precious"), "data");
}

TEST_F(Run, TargetAndSourceMustNotContainEachOther) {
  const auto before = content_of(source_);
  fs::create_directory_symlink(source_, folder_ / "link");
  for (const std::string& target : {source_, source_ + "/", source_ + "/inside", source_ + "/../source",
                                    folder_ / "link", folder_.path(), folder_ / "link/deep/er"}) {
    options_.target = target;
    options_.overwrite = true;
    expect_error(ErrorKind::kUsage, {}, [&] { quantize_checkpoint(options_); });
  }
  EXPECT_EQ(content_of(source_), before);
}

TEST_F(Run, OtherFilesOfTheFolderComeAlongButNoWeights) {
  fs::create_directories(source_ + "/encoding/deep");
  write_bytes(source_ + "/encoding/deep/encoding.py", "print()");
  write_bytes(source_ + "/LICENSE", "text");
  write_bytes(source_ + "/pytorch_model.bin", "old weights");
  fs::create_directories(source_ + "/.cache");
  write_bytes(source_ + "/.cache/x", "y");
  quantize_checkpoint(options_);
  EXPECT_EQ(read_bytes(target_ + "/encoding/deep/encoding.py"), "print()");
  EXPECT_EQ(read_bytes(target_ + "/LICENSE"), "text");
  EXPECT_EQ(read_bytes(target_ + "/tokenizer.json"), read_bytes(source_ + "/tokenizer.json"));
  EXPECT_FALSE(fs::exists(target_ + "/pytorch_model.bin"));
  EXPECT_FALSE(fs::exists(target_ + "/.cache"));
}

TEST_F(Run, SymlinksOutOfTheSourceAreRefused) {
  write_bytes(folder_ / "private", "secret");
  fs::create_symlink("tokenizer.json", source_ + "/alias.json");
  quantize_checkpoint(options_);
  EXPECT_EQ(read_bytes(target_ + "/alias.json"), read_bytes(source_ + "/tokenizer.json"));
  fs::create_symlink(folder_ / "private", source_ + "/notes.txt");
  options_.target = folder_ / "second";
  expect_bad_input({"notes.txt", "outside the folder"}, [&] { quantize_checkpoint(options_); });
}

TEST_F(Run, ProgressReachesTheTotal) {
  uint64_t last = 0, total = 0;
  quantize_checkpoint(options_, [&](const QuantizeProgress& progress) {
    EXPECT_GE(progress.done_bytes, last);
    last = progress.done_bytes;
    total = progress.total_bytes;
  });
  EXPECT_EQ(last, total);
  EXPECT_GT(total, 0u);
}

TEST_F(Run, AFileTooLargeToWriteIsAMissingResourceAndARerunCompletes) {
  const auto want = expected();
  ::signal(SIGXFSZ, SIG_IGN);
  struct rlimit old {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  struct rlimit small = old;
  small.rlim_cur = 60000;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  expect_error(ErrorKind::kResourceMissing, {target_ + ".partial"}, [&] { quantize_checkpoint(options_); });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  EXPECT_FALSE(fs::exists(target_));
  quantize_checkpoint(options_);
  EXPECT_EQ(content_of(target_), want);
}

}  // namespace
}  // namespace dsv4
