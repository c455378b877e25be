// dsv4 quantize SRC DST: runs checkpoint/quantize, shows progress, prints what was lost.
#include <fmt/format.h>
#include <signal.h>

#include <chrono>
#include <cstdio>
#include <memory>

#include "checkpoint/quantize/quantize.h"
#include "commands.h"
#include "terminal.h"

namespace dsv4::app {
namespace {

struct Settings {
  QuantizeOptions options;
  std::string dense = "keep", scale = "modelopt";
  uint64_t shard_mb = 4096;
};

DenseFormat dense_format(const std::string& name) {
  return name == "fp8" ? DenseFormat::kFp8 : name == "nvfp4" ? DenseFormat::kNvfp4 : DenseFormat::kKeep;
}
ScaleRule scale_rule(const std::string& name) {
  return name == "mse" ? ScaleRule::kMse : name == "4over6" ? ScaleRule::kFourOverSix : ScaleRule::kModelOpt;
}

std::string human_bytes(double bytes) {
  const char* const units[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  for (; bytes >= 1000.0 && unit < 4; ++unit) bytes /= 1000.0;
  return fmt::format("{:.{}f} {}", bytes, unit == 0 ? 0 : 2, units[unit]);
}

std::string human_time(double seconds) {
  const auto total = static_cast<int64_t>(seconds + 0.5);
  if (total >= 3600) return fmt::format("{}:{:02}:{:02} h", total / 3600, total / 60 % 60, total % 60);
  return fmt::format("{}:{:02} min", total / 60, total % 60);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void print_report(const QuantizeReport& report) {
  fmt::print("{:<26} {:>8} {:>16} {:<24} {:>9} {:>9} {:>9} {:>10} {:>10}\n", "kind", "tensors", "from", "  to",
             "rel.error", "saturated", "zeroed", "before", "after");
  for (const QuantizeKindStats& row : report.kinds) {
    const bool is_copy = row.from.empty();
    fmt::print("{:<26} {:>8} {:>16} {:<24} {:>9} {:>9} {:>9} {:>10} {:>10}\n", row.kind, row.num_matrices, row.from,
               is_copy ? "" : "  " + row.to, is_copy ? "" : fmt::format("{:.5f}", row.relative_error()),
               is_copy ? "" : std::to_string(row.num_saturated), is_copy ? "" : std::to_string(row.num_zeroed),
               human_bytes(static_cast<double>(row.source_bytes)), human_bytes(static_cast<double>(row.target_bytes)));
  }
  for (const std::string& note : report.notes) fmt::print("note: {}\n", note);
  fmt::print("{} -> {} in {} file{}\n", human_bytes(static_cast<double>(report.source_bytes)),
             human_bytes(static_cast<double>(report.target_bytes)), report.num_shards,
             report.num_shards == 1 ? "" : "s");
}

void run_quantize(const Settings& settings, const GlobalOptions& global) {
  // A file size limit then shows as an error of write, like a full disk, instead of killing the process.
  ::signal(SIGXFSZ, SIG_IGN);
  QuantizeOptions options = settings.options;
  options.dense = dense_format(settings.dense);
  options.scale = scale_rule(settings.scale);
  options.shard_bytes = settings.shard_mb << 20;
  const auto start = std::chrono::steady_clock::now();
  ProgressLine line(global.quiet);
  const QuantizeReport report = quantize_checkpoint(options, [&](const QuantizeProgress& progress) {
    const double seconds = seconds_since(start);
    const double made = static_cast<double>(progress.done_bytes - progress.resumed_bytes);
    const double left = static_cast<double>(progress.total_bytes - progress.done_bytes);
    const double rate = seconds > 0 ? made / seconds : 0;
    const double percent = progress.total_bytes == 0 ? 100.0
                                                     : 100.0 * static_cast<double>(progress.done_bytes) /
                                                           static_cast<double>(progress.total_bytes);
    line.update(fmt::format("{:5.1f} %  {:.0f} MB/s written  {} left  {}", percent, rate / 1e6,
                            rate > 0 ? human_time(left / rate) : "?", progress.tensor));
  });
  line.finish();
  if (global.quiet) return;
  print_report(report);
  if (report.already_complete) {
    fmt::print("{}: was complete already, made from this source with these options; checksums agree\n", options.target);
    return;
  }
  if (report.num_resumed_shards > 0)
    fmt::print("continued an earlier run: {} of {} files were finished\n", report.num_resumed_shards,
               report.num_shards);
  const double seconds = seconds_since(start);
  fmt::print("{}: {} read in {:.1f} s ({:.0f} MB/s)\n", options.target,
             human_bytes(static_cast<double>(report.source_bytes)), seconds,
             static_cast<double>(report.source_bytes) / 1e6 / seconds);
}

}  // namespace

void register_quantize(CLI::App& app, GlobalOptions& global) {
  auto settings = std::make_shared<Settings>();
  CLI::App* command = app.add_subcommand(
      "quantize", "make an NVFP4 checkpoint (ModelOpt names) from a BF16, FP8 + MXFP4 or compressed-tensors one");
  command->footer(
      "DST appears only when complete; until then the work is in DST.partial, and the same command continues it.");
  command->add_option("SRC", settings->options.source, "checkpoint folder; never changed")->required();
  command->add_option("DST", settings->options.target, "folder to make")->required();
  command->add_option("--dense", settings->dense, "attention, indexer and shared experts")
      ->check(CLI::IsMember({"keep", "fp8", "nvfp4"}))
      ->capture_default_str();
  command
      ->add_option("--scale", settings->scale,
                   "how block scales are chosen: modelopt (byte for byte), mse or 4over6 (less error)")
      ->check(CLI::IsMember({"modelopt", "mse", "4over6"}))
      ->capture_default_str();
  command->add_option("--threads", settings->options.num_threads, "0 = all CPUs")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->add_option("--shard-mb", settings->shard_mb, "largest weight file, in MiB")
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 20))
      ->capture_default_str();
  command->add_flag("--overwrite", settings->options.overwrite,
                    "replace DST if it exists, drop an unfinished run of other options");
  command->callback([settings, &global] { run_quantize(*settings, global); });
}

}  // namespace dsv4::app
