// The numeric choices of a run: they decide the numbers, the backend never does.
//
// CPU activations live in binary32 arrays. In exact mode nothing is rounded and no quantiser is simulated: an fp32
// implementation of the architecture. Otherwise values are rounded to bf16 where the model's reference code stores bf16
// (each op's contract names the places), cache rows take the format of --kv, indexer keys that of --index, and the inputs
// of both expert GEMMs that of --act.
#pragma once

#include <cstdint>

namespace dsv4 {

enum class ActFormat : uint8_t { kBf16, kNvfp4 };              // --act a16, a4
enum class KvFormat : uint8_t { kF32, kBf16, kFp8, kNvfp4 };   // --kv; kF32 only with --exact
enum class IndexFormat : uint8_t { kF32, kBf16, kFp8, kFp4 };  // --index; kF32 only with --exact

struct Precision {
  bool exact = false;
  ActFormat act = ActFormat::kBf16;
  KvFormat kv = KvFormat::kBf16;
  IndexFormat index = IndexFormat::kBf16;

  static Precision make_exact() { return {true, ActFormat::kBf16, KvFormat::kF32, IndexFormat::kF32}; }
};

}  // namespace dsv4
