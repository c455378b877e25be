// Shared by the GPU benches: timing inside CUDA graphs, the machine's own ceilings, one table and one JSON file per binary.
//
// Usage of every bench binary: dsv4_bench_gpu_<op> [--json FILE] [--quick] [--only TEXT]...
// --only: cases whose "op shape$" contains one of the texts.
//
// Timing: a graph holds `copies` launches, each on buffers of its own (together larger than L2 for the streaming cases), short ones four times;
// after warm-up the graph is replayed `kReplays` times between events; the median of time / copies is reported. Launch gaps are
// inside, CPU launch cost is not; bandwidth cases are timed with PDL too. Short calls cannot reach the ceiling of a 2 GiB copy, so the
// time of a copy of their own size stands beside them. Decode-sized cases are timed hot (the data stays in L2) and say so.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "gpu/buffer.h"
#include "gpu/context.h"
#include "gpu/device.h"
#include "gpu/stream.h"

namespace dsv4::bench {

constexpr int kReplays = 25;

struct Result {
  std::string op, shape;
  double us = 0;
  double bytes = 0;     // moved, each input and output once; 0: latency case
  std::string ceiling;  // "copy", "read" or ""
  double share = 0;     // of the ceiling measured in this run
  std::string note;
  double pdl_us = 0;  // bandwidth cases: launched with PDL, so that each call's start hides behind its predecessor
  double same_size_us =
      0;  // bandwidth cases: a copy that moves as many bytes, rotated and launched the same way (no PDL)
};

class Bench {
 public:
  Bench(int argc, char** argv);
  ~Bench();  // prints the table, writes the JSON

  // body(context, copy) launches one call on the buffers of that copy.
  double time_us(int copies, const std::function<void(const GpuContext&, int)>& body, bool dependent = false);
  // Runs and records a bandwidth case.
  void stream(const std::string& op, const std::string& shape, double bytes, const std::string& ceiling, int copies,
              const std::function<void(const GpuContext&, int)>& body);
  // Runs and records a latency case: 32 dependent calls in a graph, with and without PDL, beside the empty kernel's time.
  void latency(const std::string& op, const std::string& shape,
               const std::function<void(const GpuContext&, int)>& body);
  void record(Result result) { results_.push_back(std::move(result)); }

  bool quick() const { return quick_; }
  GpuContext context() const { return context_; }

 private:
  void measure_ceilings();
  double same_size_copy_us(double bytes, int copies);
  bool wanted(const std::string& op, const std::string& shape) const;

  gpu::Stream stream_;
  GpuContext context_;
  gpu::Device device_;
  std::string json_path_;
  std::vector<std::string> only_;
  bool quick_ = false;
  double copy_ = 0, own_copy_ = 0, read_ = 0, launch_us_ = 0, launch_pdl_us_ = 0;
  std::vector<Result> results_;
  std::vector<std::pair<std::pair<int64_t, int>, double>> same_size_;  // (bytes, copies) -> us
};

// Pseudo-random bytes, never zeros: any value of any format except that bit patterns of one kind can be masked out.
void fill_random(void* device, int64_t bytes, uint32_t seed, cudaStream_t stream);
// bf16 values around +-1.
void fill_random_bf16(void* device, int64_t count, uint32_t seed, cudaStream_t stream);
void fill_random_f32(void* device, int64_t count, uint32_t seed, cudaStream_t stream);
// ue4m3 codes 0x20..0x5f.
void fill_random_sf(void* device, int64_t bytes, uint32_t seed, cudaStream_t stream);

void launch_empty(const GpuContext& context);

// main(): runs body on a Bench; an error (no GPU, a wrong argument) is printed and becomes the exit code of base/check.h.
int run(int argc, char** argv, void (*body)(Bench&));

}  // namespace dsv4::bench
