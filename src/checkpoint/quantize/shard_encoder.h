// Makes the bytes of one shard after another: streams rows of the source through the encoders into a SafetensorsWriter.
//
// Memory: one window of rows at a time (about 50 MB), the scale factors of one matrix, and the pages of that window.
// Results do not depend on the number of threads: every sum is over chunks of fixed size, in order.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/threads.h"
#include "checkpoint/quantize/group_rules.h"
#include "checkpoint/quantize/plan.h"
#include "checkpoint/quantize/source_rows.h"
#include "checkpoint/safetensors.h"

namespace dsv4 {

struct ShardResult {
  std::vector<QuantizeKindStats> kinds;
  std::vector<std::string> notes;
};

class ShardEncoder {
 public:
  // on_bytes(tensor name, bytes written) after every window.
  using OnBytes = std::function<void(std::string_view, uint64_t)>;
  ShardEncoder(const Checkpoint& checkpoint, const QuantizePlan& plan, ScaleRule rule, ThreadPool& pool,
               OnBytes on_bytes);

  ShardResult write(const OutputShard& shard, SafetensorsWriter& writer);

 private:
  // What encoding needs to know about a tensor, or a w1/w3 pair, as a whole.
  struct Common {
    GlobalScale global{1.0f};
    bool is_cast = false;           // MXFP4, lossless
    uint8_t max_byte = 0;           // is_cast: the largest ue8m0 byte of a group that is not zero
    int64_t num_beyond_window = 0;  // MXFP4 that could not be cast: groups the window would have lost
    int spread = 0;
  };
  struct Mxfp4Range {
    int max_byte = -1;  // -1: every group is zero
    int min_byte = 256;
    void add(const Mxfp4Range& other);
  };

  const MatrixJob& job(int idx) const { return plan_.jobs[static_cast<size_t>(idx)]; }
  const Common& common_of(int job_idx);
  AmaxRange scan_amax(const MatrixJob& job);
  Mxfp4Range scan_mxfp4(const MatrixJob& job);
  int64_t count_groups_below(const MatrixJob& job, int min_byte);

  void write_source(const OutputTensor& tensor, SafetensorsWriter& writer);
  void write_nvfp4_codes(const OutputTensor& tensor, SafetensorsWriter& writer);
  void write_fp8_codes(const OutputTensor& tensor, SafetensorsWriter& writer);
  void write_scales(const OutputTensor& tensor, SafetensorsWriter& writer);
  void write_scalar(const OutputTensor& tensor, SafetensorsWriter& writer);
  void put(const OutputTensor& tensor, SafetensorsWriter& writer, const void* data, uint64_t bytes);
  void count_matrix(int job_idx, const GroupLoss& loss, int64_t num_groups);
  void count_copied(const OutputTensor& tensor);

  // Rows in windows, a window in chunks on all threads. body(first, begin, end): a chunk's rows and the first one of its
  // window; returns what the chunk found, a Partial. after(first, last): in order, on this thread. Returns the sum, formed in
  // the order of the chunks.
  template <class Partial, class Body, class After>
  Partial for_windows(const StoredMatrix& matrix, int64_t chunk_rows, const Body& body, const After& after);

  const QuantizePlan& plan_;
  ScaleRule rule_;
  ThreadPool& pool_;
  OnBytes on_bytes_;
  MappedPages pages_;
  std::map<int, Common> common_;                // by the smaller job index of a pair
  std::map<int, std::vector<uint8_t>> scales_;  // computed with the codes, written after them
  std::map<std::string, QuantizeKindStats> kinds_;
  std::vector<std::string> notes_;
};

}  // namespace dsv4
