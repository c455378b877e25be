// dsv4_quantize.json: which shards are finished, made from what, with which options, and their statistics.
//
// In "<target>.partial" it lets a killed run continue; in the finished target it is the record of how it was made. Shards
// are believed only if size and checksum still agree.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/threads.h"
#include "checkpoint/quantize/quantize.h"
#include "checkpoint/quantize/shard_encoder.h"

namespace dsv4 {

constexpr const char* kJournalName = "dsv4_quantize.json";

struct JournalShard {
  std::string name;
  uint64_t bytes = 0;
  std::string checksum;
  ShardResult result;
};

struct Journal {
  std::string dense, scale;
  uint64_t shard_bytes = 0;
  std::string source_id;     // hash of config.json and of every source file's name, size and header
  std::string source_times;  // hash of modification times: kept while partial, not in the finished record
  std::vector<JournalShard> shards;

  const JournalShard* find(const std::string& name) const;
};

std::string write_journal(const Journal& journal);
// Throws bad input when text is no journal.
Journal parse_journal(const std::string& text, const std::string& path);

// Empty if made by the same options from the same source, else what differs.
std::string journal_difference(const Journal& found, const Journal& wanted);

// Hashes for Journal. source_id reads config.json and the headers.
std::string source_identity(const Checkpoint& checkpoint);
std::string source_times(const Checkpoint& checkpoint);

// 64 bits over the whole file, in parallel; against truncation and torn writes, not against an attacker.
std::string file_checksum(const std::string& path, ThreadPool& pool);

}  // namespace dsv4
