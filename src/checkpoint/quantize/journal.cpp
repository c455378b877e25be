// The journal's JSON and the hashes in it.
#include "checkpoint/quantize/journal.h"

#include <sys/mman.h>

#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/math.h"

namespace dsv4 {
namespace {

constexpr int kVersion = 1;
constexpr uint64_t kBlockBytes = 4ull << 20;

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;  // odd, 2^64 / golden ratio: spreads every input bit upwards
  return hash ^ (hash >> 32);
}

// Four independent chains, so that multiplications overlap.
uint64_t hash_bytes(const void* data, uint64_t bytes, uint64_t seed) {
  const char* from = static_cast<const char*>(data);
  uint64_t lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
  uint64_t offset = 0;
  for (; offset + 32 <= bytes; offset += 32) {
    uint64_t words[4];
    std::memcpy(words, from + offset, 32);
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = mix(lanes[lane], words[lane]);
  }
  uint64_t hash = mix(mix(mix(lanes[0], lanes[1]), lanes[2]), lanes[3]);
  for (; offset < bytes; offset += 8) {
    uint64_t word = 0;
    std::memcpy(&word, from + offset, std::min<uint64_t>(8, bytes - offset));
    hash = mix(hash, word);
  }
  return mix(hash, bytes);
}

std::string hex(uint64_t value) { return fmt::format("{:016x}", value); }

Json stats_json(const QuantizeKindStats& s) {
  return {{"kind", s.kind},
          {"from", s.from},
          {"to", s.to},
          {"matrices", s.num_matrices},
          {"elements", s.num_elements},
          {"groups", s.num_groups},
          {"saturated", s.num_saturated},
          {"zeroed", s.num_zeroed},
          {"source_bytes", s.source_bytes},
          {"target_bytes", s.target_bytes},
          {"error_sq", s.error_sq},
          {"norm_sq", s.norm_sq}};
}

QuantizeKindStats stats_from(const Json& json) {
  QuantizeKindStats s;
  s.kind = json.at("kind");
  s.from = json.at("from");
  s.to = json.at("to");
  s.num_matrices = json.at("matrices");
  s.num_elements = json.at("elements");
  s.num_groups = json.at("groups");
  s.num_saturated = json.at("saturated");
  s.num_zeroed = json.at("zeroed");
  s.source_bytes = json.at("source_bytes");
  s.target_bytes = json.at("target_bytes");
  s.error_sq = json.at("error_sq");
  s.norm_sq = json.at("norm_sq");
  return s;
}

}  // namespace

const JournalShard* Journal::find(const std::string& name) const {
  for (const JournalShard& shard : shards)
    if (shard.name == name) return &shard;
  return nullptr;
}

std::string write_journal(const Journal& journal) {
  Json json{{"made_by", "dsv4 quantize"},
            {"version", kVersion},
            {"options", {{"dense", journal.dense}, {"scale", journal.scale}, {"shard_bytes", journal.shard_bytes}}},
            {"source_id", journal.source_id},
            {"shards", Json::array()}};
  if (!journal.source_times.empty()) json["source_times"] = journal.source_times;
  for (const JournalShard& shard : journal.shards) {
    Json entry{{"name", shard.name},
               {"bytes", shard.bytes},
               {"checksum", shard.checksum},
               {"notes", shard.result.notes},
               {"kinds", Json::array()}};
    for (const QuantizeKindStats& row : shard.result.kinds) entry["kinds"].push_back(stats_json(row));
    json["shards"].push_back(std::move(entry));
  }
  return json.dump(1) + "\n";
}

Journal parse_journal(const std::string& text, const std::string& path) {
  const Json json = parse_json(text, path);
  try {
    if (json.at("made_by") != "dsv4 quantize" || json.at("version") != kVersion)
      throw_bad_input("{}: not a journal of this version of dsv4 quantize", path);
    Journal journal;
    journal.dense = json.at("options").at("dense");
    journal.scale = json.at("options").at("scale");
    journal.shard_bytes = json.at("options").at("shard_bytes");
    journal.source_id = json.at("source_id");
    journal.source_times = json.value("source_times", "");
    for (const Json& entry : json.at("shards")) {
      JournalShard shard;
      shard.name = entry.at("name");
      shard.bytes = entry.at("bytes");
      shard.checksum = entry.at("checksum");
      shard.result.notes = entry.at("notes").get<std::vector<std::string>>();
      for (const Json& row : entry.at("kinds")) shard.result.kinds.push_back(stats_from(row));
      journal.shards.push_back(std::move(shard));
    }
    return journal;
  } catch (const Json::exception& error) {
    throw_bad_input("{}: not a journal of dsv4 quantize: {}", path, error.what());
  }
}

std::string journal_difference(const Journal& found, const Journal& wanted) {
  std::string text;
  const auto differ = [&](std::string_view what, const std::string& a, const std::string& b) {
    if (a != b) text += fmt::format("{}{} {}, not {}", text.empty() ? "" : "; ", what, a, b);
  };
  differ("--dense", found.dense, wanted.dense);
  differ("--scale", found.scale, wanted.scale);
  differ("shard bytes", std::to_string(found.shard_bytes), std::to_string(wanted.shard_bytes));
  differ("source", found.source_id, wanted.source_id);
  if (!found.source_times.empty()) differ("source files modified at", found.source_times, wanted.source_times);
  return text;
}

std::string source_identity(const Checkpoint& checkpoint) {
  const std::string config = checkpoint.config_json().dump();
  uint64_t hash = hash_bytes(config.data(), config.size(), 0);
  for (const auto& file : checkpoint.files()) {
    const std::string name = std::filesystem::path(file->path()).filename().string();
    hash = hash_bytes(name.data(), name.size(), hash);
    const auto bytes = file->mapped_bytes();
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));  // checked when the file was opened
    hash = hash_bytes(bytes.data(), 8 + header_bytes, mix(hash, bytes.size()));
  }
  return hex(hash);
}

std::string source_times(const Checkpoint& checkpoint) {
  uint64_t hash = 0;
  for (const auto& file : checkpoint.files())
    hash = mix(hash, static_cast<uint64_t>(std::filesystem::last_write_time(file->path()).time_since_epoch().count()));
  return hex(hash);
}

std::string file_checksum(const std::string& path, ThreadPool& pool) {
  const MappedFile file(path);
  const auto num_blocks = static_cast<int64_t>((file.size() + kBlockBytes - 1) / kBlockBytes);
  std::vector<uint64_t> hashes(static_cast<size_t>(num_blocks));
  pool.parallel_for(num_blocks, [&](int64_t block) {
    const uint64_t begin = static_cast<uint64_t>(block) * kBlockBytes;
    const uint64_t count = std::min(kBlockBytes, file.size() - begin);
    const std::byte* data = file.bytes().data() + begin;
    hashes[static_cast<size_t>(block)] = hash_bytes(data, count, 0);
    ::madvise(const_cast<std::byte*>(data), count, MADV_DONTNEED);  // blocks start at page boundaries of the map
  });
  return hex(hash_bytes(hashes.data(), hashes.size() * sizeof(uint64_t), file.size()));
}

}  // namespace dsv4
