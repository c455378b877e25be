// The MoE layer's bench on one Hopper GPU, as a library: the binary dsv4_bench_gpu_moe and `dsv4 bench moe --backend cuda`.
//
// Method (docs/kernels/moe_sm90.md): R layers per graph, each with its own routing, input and output; L2 flushed before each
// replay by reading 384 MB; warm-up 0.3 s; median of the replays; GB/s = weight bytes of activated experts / time.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "gpu/buffer.h"
#include "gpu/stream.h"

namespace dsv4::bench {

// ---- ceilings (moe_ceilings_sm90.cu, moe_matmul.cpp) ----

struct MoeCeilings {
  std::string device;
  double read_gb_s = 0;       // 3.6 GB, the larger of two read kernels
  double read_85mb_gb_s = 0;  // what one token's experts weigh
  double read_620mb_gb_s = 0;
  double copy_gb_s = 0;        // read + written
  double matmul_tflops = 0;    // BF16 8192^3 through cuBLASLt, sustained over a second; 0: no library
  std::string matmul_library;  // or why there is none
};
MoeCeilings measure_moe_ceilings();
nlohmann::json to_json(const MoeCeilings& ceilings);
// Median TFLOP/s of n x n x n BF16 products with FP32 sums on random data. Throws Error(kResourceMissing) without libcublasLt.
double measure_bf16_matmul(int n, const gpu::Stream& stream, std::string* library);

// Ring-copy experiments: bulk copies by chunk, depth and order.
int run_moe_copies();

// ---- timing (moe_timing_sm90.cu) ----

struct MoeTimeOptions {
  std::string shape = "flash";
  std::vector<int64_t> tokens{1, 8, 64, 256, 1024, 4096};
  std::vector<std::string> routings{"uniform", "zipf"};
  std::vector<std::string> tiers{"auto"};  // auto, ring, stream, tiled
  bool a4 = false;
  bool shared = false;    // with the FP8 shared expert
  bool sides = true;      // weights and tasks placed by the sides of the L2
  bool apart = false;     // another kernel between layers, so that none starts early
  bool read_only = true;  // also time a kernel that only reads the same weights
  bool parts = false;     // ring and streaming tier: also their loads without arithmetic and the reverse
  int samples = 30;
};
struct MoeTimeRow {
  std::string shape, routing, tier, act;
  int64_t tokens = 0;
  std::string plan;                   // MoePlan::to_string
  double activated = 0, largest = 0;  // experts; rows of the fullest
  double us = 0;
  double floor_us = 0;          // max(bytes / read stream, flops / BF16 matmul), both of this run
  double nominal_floor_us = 0;  // the same with 4.6 TB/s and 790 TFLOP/s
  double gb_per_s = 0, tflop_per_s = 0;
  double read_us = 0;  // the stream-only kernel
  double loads_us = 0, math_us = 0;
  double shared_us = 0;  // the shared expert's launches alone, if the plan has it before the routed experts
};
nlohmann::json to_json(const MoeTimeRow& row);
void time_moe(const MoeTimeOptions& options, const MoeCeilings& ceilings,
              const std::function<void(const MoeTimeRow&)>& report);

// A few plain launches, for profilers.
int run_moe_once(const std::string& shape, int64_t tokens, const std::string& tier);

// ---- checks (moe_check_sm90.cu): what the tests do, at more sizes ----

int run_moe_check(uint64_t seed);
int run_moe_fuzz(int cases, const std::string& shape);

// ---- shared ----

// Median time of one call in us: a graph of `copies` calls, replayed with cold L2.
double moe_median_us(const gpu::Stream& stream, const gpu::DeviceBuffer& flush, int copies, int samples,
                     double warm_seconds, const std::function<void(int copy, cudaStream_t)>& body);

// Throws a usage error that names what is unknown. (fmt and nvcc do not go together.)
[[noreturn]] void throw_unknown(const char* what, const std::string& name);

// Tables as printed by the binary and the CLI.
std::string moe_ceilings_line(const MoeCeilings& ceilings);
std::string moe_table_head();
std::string moe_table_line(const MoeTimeRow& row);

}  // namespace dsv4::bench
