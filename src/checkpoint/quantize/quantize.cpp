// The run: plan, resume or start, shards with journal, the small files, rename.
#include "checkpoint/quantize/quantize.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>

#include "base/check.h"
#include "base/file.h"
#include "base/threads.h"
#include "checkpoint/quantize/journal.h"
#include "checkpoint/quantize/plan.h"
#include "checkpoint/quantize/quant_config.h"
#include "checkpoint/quantize/shard_encoder.h"
#include "checkpoint/quantize/target_folder.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxJournalBytes = 64u << 20;
constexpr uint64_t kMaxConfigBytes = 16u << 20;
constexpr const char* kIndexName = "model.safetensors.index.json";

void merge(std::vector<QuantizeKindStats>& all, const std::vector<QuantizeKindStats>& some) {
  for (const QuantizeKindStats& row : some) {
    auto same = std::find_if(all.begin(), all.end(), [&](const QuantizeKindStats& other) {
      return other.kind == row.kind && other.from == row.from && other.to == row.to;
    });
    if (same == all.end()) {
      all.push_back(row);
      continue;
    }
    same->num_matrices += row.num_matrices;
    same->num_elements += row.num_elements;
    same->num_groups += row.num_groups;
    same->num_saturated += row.num_saturated;
    same->num_zeroed += row.num_zeroed;
    same->source_bytes += row.source_bytes;
    same->target_bytes += row.target_bytes;
    same->error_sq += row.error_sq;
    same->norm_sq += row.norm_sq;
  }
}

QuantizeReport report_of(const Journal& journal) {
  QuantizeReport report;
  for (const JournalShard& shard : journal.shards) {
    merge(report.kinds, shard.result.kinds);
    report.notes.insert(report.notes.end(), shard.result.notes.begin(), shard.result.notes.end());
    report.target_bytes += shard.bytes;
  }
  // What was copied has no formats and comes last.
  std::stable_partition(report.kinds.begin(), report.kinds.end(),
                        [](const QuantizeKindStats& row) { return !row.from.empty(); });
  report.num_shards = static_cast<int>(journal.shards.size());
  return report;
}

class Run {
 public:
  Run(const QuantizeOptions& options, const std::function<void(const QuantizeProgress&)>& progress)
      : options_(options),
        progress_(progress),
        source_(open_checkpoint(options.source)),
        plan_(plan_quantize(source_, options)),
        pool_(options.num_threads),
        folder_(options.target) {
    wanted_.dense = dense_format_name(options.dense);
    wanted_.scale = scale_rule_name(options.scale);
    wanted_.shard_bytes = options.shard_bytes;
    wanted_.source_id = source_identity(source_);
    wanted_.source_times = source_times(source_);
  }

  QuantizeReport run() {
    if (folder_.target_exists() && !options_.overwrite) return existing_target();
    folder_.open();
    resume();
    uint64_t left = plan_.target_bytes;
    for (const JournalShard& shard : journal_.shards) left -= std::min(left, shard.bytes);
    folder_.require_space(left);
    report_progress("", 0);
    encode_shards();
    write_small_files();
    folder_.finish(options_.overwrite);
    QuantizeReport report = report_of(journal_);
    report.source_bytes = source_bytes();
    report.num_resumed_shards = num_resumed_;
    return report;
  }

 private:
  // The same request again is not an error: the target is what was asked for.
  QuantizeReport existing_target() {
    const std::string journal_path = (fs::path(options_.target) / kJournalName).string();
    if (!fs::exists(journal_path))
      throw_bad_input("{}: exists and was not made by dsv4 quantize; choose another target or use --overwrite",
                      options_.target);
    const Journal found = parse_journal(read_text_file(journal_path, kMaxJournalBytes), journal_path);
    const std::string difference = journal_difference(found, wanted_);
    if (!difference.empty())
      throw_bad_input("{}: exists, made with {}; choose another target or use --overwrite", options_.target,
                      difference);
    for (const JournalShard& shard : found.shards) {
      const std::string path = (fs::path(options_.target) / shard.name).string();
      if (!is_intact(path, shard))
        throw_bad_input("{}: missing or changed since it was made; use --overwrite to make it again", path);
    }
    QuantizeReport report = report_of(found);
    report.source_bytes = source_bytes();
    report.already_complete = true;
    return report;
  }

  bool is_intact(const std::string& path, const JournalShard& shard) {
    std::error_code error;
    const uint64_t bytes = fs::file_size(path, error);
    return !error && bytes == shard.bytes && file_checksum(path, pool_) == shard.checksum;
  }

  void resume() {
    journal_ = wanted_;
    const std::string path = folder_.partial_file(kJournalName);
    if (!fs::exists(path)) {
      for (const auto& entry : fs::directory_iterator(folder_.partial())) {
        const std::string name = entry.path().filename().string();
        if (name.find(".tmp-") != std::string::npos) continue;  // the journal's own first write, interrupted
        if (!options_.overwrite)
          throw_bad_input("{}: exists and is no unfinished run of dsv4 quantize; remove it or use --overwrite",
                          folder_.partial());
        folder_.discard_partial();
        break;
      }
      save_journal();
      return;
    }
    Journal found;
    std::string difference;
    try {
      found = parse_journal(read_text_file(path, kMaxJournalBytes), path);
      difference = journal_difference(found, wanted_);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kBadInput) throw;
      difference = error.what();
    }
    if (!difference.empty()) {
      if (!options_.overwrite)
        throw_bad_input(
            "{}: an unfinished run with other options or another source: {}; finish that one, remove the folder or "
            "use --overwrite",
            folder_.partial(), difference);
      folder_.discard_partial();
      save_journal();
      return;
    }
    for (JournalShard& shard : found.shards)
      if (is_intact(folder_.partial_file(shard.name), shard)) journal_.shards.push_back(std::move(shard));
    num_resumed_ = static_cast<int>(journal_.shards.size());
    save_journal();
  }

  void save_journal() { write_file_atomically(folder_.partial_file(kJournalName), write_journal(journal_)); }

  void report_progress(std::string_view tensor, uint64_t bytes) {
    done_bytes_ += bytes;
    if (progress_) progress_({done_bytes_, plan_.target_bytes, resumed_bytes_, tensor});
  }

  void encode_shards() {
    ShardEncoder encoder(source_, plan_, options_.scale, pool_,
                         [this](std::string_view tensor, uint64_t bytes) { report_progress(tensor, bytes); });
    for (const OutputShard& shard : plan_.shards) {
      if (journal_.find(shard.file_name) != nullptr) {
        resumed_bytes_ += shard.bytes;
        report_progress("", shard.bytes);
        continue;
      }
      std::vector<TensorSpec> specs;
      for (const OutputTensor& tensor : shard.tensors) specs.push_back(tensor.spec);
      const std::string path = folder_.partial_file(shard.file_name);
      SafetensorsWriter writer(path, specs, {{"format", "pt"}});
      JournalShard entry;
      entry.name = shard.file_name;
      entry.result = encoder.write(shard, writer);
      writer.finish();
      entry.bytes = fs::file_size(path);
      entry.checksum = file_checksum(path, pool_);
      // In the order of the plan, whatever was resumed.
      const auto behind = std::find_if(journal_.shards.begin(), journal_.shards.end(),
                                       [&](const JournalShard& other) { return other.name > entry.name; });
      journal_.shards.insert(behind, std::move(entry));
      save_journal();
    }
  }

  void write_small_files() {
    const std::string config = read_text_file((fs::path(options_.source) / "config.json").string(), kMaxConfigBytes);
    std::set<std::string> made{"config.json", "hf_quant_config.json", kJournalName};
    folder_.copy_other_files(options_.source, made);
    if (plan_.shards.size() > 1) write_file_atomically(folder_.partial_file(kIndexName), make_index_json(plan_));
    write_file_atomically(folder_.partial_file("hf_quant_config.json"), make_hf_quant_config_json(plan_, options_));
    write_file_atomically(folder_.partial_file("config.json"), make_config_json(config, plan_, options_));
    // The journal stays as it is until the rename: a run killed here still resumes. Its finished form leaves out the times.
    Journal record = journal_;
    record.source_times.clear();
    write_file_atomically(folder_.partial_file(kJournalName), write_journal(record));
  }

  uint64_t source_bytes() const {
    uint64_t bytes = 0;
    for (const auto& file : source_.files()) bytes += file->mapped_bytes().size();
    return bytes;
  }

  const QuantizeOptions& options_;
  const std::function<void(const QuantizeProgress&)>& progress_;
  Checkpoint source_;
  QuantizePlan plan_;
  ThreadPool pool_;
  TargetFolder folder_;
  Journal wanted_;
  Journal journal_;
  int num_resumed_ = 0;
  uint64_t done_bytes_ = 0;
  uint64_t resumed_bytes_ = 0;
};

}  // namespace

double QuantizeKindStats::relative_error() const { return norm_sq > 0 ? std::sqrt(error_sq / norm_sq) : 0.0; }

QuantizeReport quantize_checkpoint(const QuantizeOptions& options,
                                   const std::function<void(const QuantizeProgress&)>& progress) {
  check_target_path(options.source, options.target);
  if (options.shard_bytes == 0) throw_usage("shard size 0");
  return Run(options, progress).run();
}

}  // namespace dsv4
