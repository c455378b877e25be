// dsv4 quantize as a user runs it, under everything that can stop it: kill -9, a full disk, a read-only target, a file size
// limit, and in how much memory. The source never changes, the target is whole or absent, and a rerun completes it.
//
// DSV4_BINARY in the environment replaces the binary of this build.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include "checkpoint/checkpoint.h"
#include "checkpoint/synth.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

std::string binary() {
  const char* from_environment = ::getenv("DSV4_BINARY");
  return from_environment != nullptr ? from_environment : DSV4_BINARY_PATH;
}

std::string read_bytes(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

std::map<std::string, std::string> content_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files[entry.path().lexically_relative(folder).string()] = read_bytes(entry.path());
  return files;
}

struct Outcome {
  int exit_code = -1;  // -1: ended by a signal
  int signal = 0;
  int64_t max_rss_bytes = 0;
  std::string output;
};

struct Limits {
  uint64_t file_bytes = 0;  // RLIMIT_FSIZE, 0 = none
  int kill_after_us = -1;   // kill -9
};

Outcome run(const std::vector<std::string>& arguments, const std::string& log, const Limits& limits = {}) {
  const pid_t child = ::fork();
  if (child == 0) {
    if (limits.file_bytes > 0) {
      const struct rlimit limit { limits.file_bytes, limits.file_bytes };
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    if (::freopen("/dev/null", "r", stdin) == nullptr || ::freopen(log.c_str(), "w", stdout) == nullptr) ::_exit(126);
    ::dup2(STDOUT_FILENO, STDERR_FILENO);
    std::vector<char*> argv;
    for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  if (limits.kill_after_us >= 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(limits.kill_after_us));
    ::kill(child, SIGKILL);  // our own child, not yet waited for: the id cannot be another process
  }
  int status = 0;
  struct rusage usage {};
  ::wait4(child, &status, 0, &usage);
  Outcome outcome;
  if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) outcome.signal = WTERMSIG(status);
  outcome.max_rss_bytes = static_cast<int64_t>(usage.ru_maxrss) * 1024;
  outcome.output = read_bytes(log);
  return outcome;
}

class QuantizeCrash : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "dsv4-crash-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    log_ = (folder_ / "log").string();
  }
  void TearDown() override { fs::remove_all(folder_); }

  void make_source(const Json& changes) {
    SynthOptions options;
    options.config = synth_shape_config("demo");
    options.config.update(changes);
    write_synth_checkpoint(source(), options);
  }
  std::string source() const { return (folder_ / "source").string(); }
  std::string target() const { return (folder_ / "target").string(); }
  std::vector<std::string> command(const std::string& target) const {
    return {binary(), "quantize", source(), target, "--dense", "nvfp4", "--shard-mb", "1", "--threads", "2"};
  }

  fs::path folder_;
  std::string log_;
};

// About 4 MB in a dozen shards.
const Json kSmall = Json::parse(R"({"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4], "n_routed_experts": 12,
                                    "vocab_size": 512})");

TEST_F(QuantizeCrash, KilledAtRandomItEndsInTheSameBytes) {
  make_source(kSmall);
  const auto source_before = content_of(source());
  const auto start = std::chrono::steady_clock::now();
  Outcome whole = run(command((folder_ / "whole").string()), log_);
  ASSERT_EQ(whole.exit_code, 0) << whole.output;
  const auto whole_us =
      std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start).count();
  const auto want = content_of(folder_ / "whole");
  ASSERT_GT(want.size(), 8u);

  std::mt19937 random(5);
  int num_killed = 0, num_resumed = 0;
  // On a busy machine a round may end before most of its kills: then there are more rounds.
  for (int round = 0; round < 6 || (round < 30 && (num_killed <= 6 || num_resumed == 0)); ++round) {
    fs::remove_all(target());
    int attempts = 0;
    for (;; ++attempts) {
      // Several kills a round, then a run that may finish.
      const auto after = static_cast<int>(random() % static_cast<uint64_t>(whole_us));
      const Outcome outcome = run(command(target()), log_, {.kill_after_us = attempts < 4 ? after : -1});
      num_killed += outcome.signal == SIGKILL;
      if (fs::exists(target())) {
        ASSERT_EQ(content_of(target()), want) << "a target that is not whole";
      }
      if (outcome.signal == SIGKILL) continue;
      ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
      num_resumed += outcome.output.find("continued an earlier run") != std::string::npos;
      break;
    }
    ASSERT_EQ(content_of(target()), want) << "round " << round;
    ASSERT_FALSE(fs::exists(target() + ".partial"));
  }
  EXPECT_GT(num_killed, 6);
  EXPECT_GT(num_resumed, 0);
  EXPECT_EQ(content_of(source()), source_before);
}

TEST_F(QuantizeCrash, AFileSizeLimitEndsWithThreeAndARerunCompletes) {
  make_source(kSmall);
  const Outcome failed = run(command(target()), log_, {.file_bytes = 300000});
  EXPECT_EQ(failed.exit_code, 3) << failed.output;
  EXPECT_NE(failed.output.find("target.partial"), std::string::npos) << failed.output;
  EXPECT_NE(failed.output.find("File too large"), std::string::npos) << failed.output;
  EXPECT_FALSE(fs::exists(target()));
  const Outcome done = run(command(target()), log_);
  EXPECT_EQ(done.exit_code, 0) << done.output;
  EXPECT_NO_THROW(open_checkpoint(target()));
}

// What a shell script prints in a mount namespace of its own.
std::string in_own_mounts(const std::string& script, const std::string& log, bool& possible) {
  std::vector<std::string> probe{
      "unshare", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt && echo works"};
  possible = run(probe, log).output.find("works") != std::string::npos;
  if (!possible) return "";
  return run({"unshare", "--map-root-user", "--mount", "sh", "-c", script}, log).output;
}

TEST_F(QuantizeCrash, AFullDiskEndsWithThreeAndARerunCompletes) {
  make_source(kSmall);
  const std::string mount = (folder_ / "disk").string();
  fs::create_directories(mount);
  const std::string quantize = fmt::format("{} quantize {} {}/target --shard-mb 1", binary(), source(), mount);
  // First too small from the start, then full in the middle of the run (no inodes left after some shards), then enough.
  bool possible = false;
  const std::string output =
      in_own_mounts(fmt::format("mount -t tmpfs -o size=2m none {0}; {1}; echo first $?;"
                                "mount -o remount,size=64m,nr_inodes=8 {0}; {1}; echo second $?; ls {0};"
                                "mount -o remount,nr_inodes=1000 {0}; {1}; echo third $?; ls {0}",
                                mount, quantize),
                    log_, possible);
  if (!possible) GTEST_SKIP() << "cannot mount a tmpfs in a namespace of its own here";
  EXPECT_NE(output.find("are still to be written"), std::string::npos) << output;
  EXPECT_NE(output.find("first 3\n"), std::string::npos) << output;
  EXPECT_NE(output.find("No space left on device"), std::string::npos) << output;
  EXPECT_NE(output.find("second 3\ntarget.partial\n"), std::string::npos) << output;
  EXPECT_NE(output.find("continued an earlier run"), std::string::npos) << output;
  EXPECT_TRUE(output.ends_with("third 0\ntarget\n")) << output;
}

TEST_F(QuantizeCrash, AReadOnlyTargetEndsWithThree) {
  make_source(kSmall);
  const std::string mount = (folder_ / "disk").string();
  fs::create_directories(mount);
  bool possible = false;
  const std::string output =
      in_own_mounts(fmt::format("mount -t tmpfs -o ro none {0}; {1} quantize {2} {0}/target; echo code $?; ls -A {0}",
                                mount, binary(), source()),
                    log_, possible);
  if (!possible) GTEST_SKIP() << "cannot mount a read-only tmpfs in a namespace of its own here";
  EXPECT_NE(output.find("Read-only file system"), std::string::npos) << output;
  EXPECT_TRUE(output.ends_with("code 3\n")) << output;
}

TEST_F(QuantizeCrash, MemoryIsBoundedOnALargeTensor) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "AddressSanitizer's own memory is not what is measured";
#endif
  // attn.wq_b of [24576, 4096]: 201 MB; each of head and embedding 134 MB, copied.
  make_source(
      Json::parse(R"({"num_hidden_layers": 1, "compress_ratios": [0], "n_routed_experts": 4, "num_experts_per_tok": 2,
                              "num_hash_layers": 0, "q_lora_rank": 4096, "num_attention_heads": 48, "vocab_size": 262144})"));
  auto arguments = command(target());
  arguments[7] = "4096";
  const Outcome outcome = run(arguments, log_);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  const Checkpoint checkpoint = open_checkpoint(source());
  ASSERT_GT(checkpoint.at("layers.0.attn.wq_b.weight").bytes(), 200'000'000);
  RecordProperty("max_rss_bytes", static_cast<int>(outcome.max_rss_bytes >> 10));
  EXPECT_LT(outcome.max_rss_bytes, 120'000'000) << outcome.output;
}

TEST_F(QuantizeCrash, WrongUsageIsTwoAndBadInputIsOne) {
  make_source(kSmall);
  EXPECT_EQ(run({binary(), "quantize", source()}, log_).exit_code, 2);
  EXPECT_EQ(run({binary(), "quantize", source(), target(), "--dense", "int4"}, log_).exit_code, 2);
  EXPECT_EQ(run({binary(), "quantize", source(), source() + "/inside"}, log_).exit_code, 2);
  EXPECT_EQ(run({binary(), "quantize", (folder_ / "none").string(), target()}, log_).exit_code, 1);
  EXPECT_FALSE(fs::exists(target()));
  EXPECT_FALSE(fs::exists(target() + ".partial"));
}

}  // namespace
}  // namespace dsv4
