// The benchmark harness: an op describes one call and its cost, the harness times it and sets it against the machine's own
// ceilings, measured in the same run.
//
// Adding an op: one function in bench/ops/<op>_bench.cpp that calls Bench::measure for each case, one line in bench.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"
#include "ops/cpu_context.h"
#include "ops/gemm/gemm.h"

namespace dsv4::bench {

struct BenchOptions {
  std::string shape = "flash";  // flash, pro, demo
  std::vector<int64_t> rows{1, 2, 4, 8, 32, 128, 512};
  std::string filter;  // only cases whose name contains it
  int64_t working_set_bytes =
      1280ll << 20;  // weights rotated over: larger than the last-level cache (300 MiB on big Xeons)
  int min_reps = 20;
  double min_seconds = 0.3;  // per case
  double max_seconds = 3.0;  // a case stops here whatever min_reps says (never below 3 repetitions)
};

// Dimensions of the models the kernels are for (spec 1.1); demo is the test model.
struct ModelShape {
  int64_t hidden, inter;
  int num_experts, num_topk;
};
ModelShape model_shape(const std::string& name);

// Bytes per second and operations per second of this machine, with the threads of the run.
struct Ceilings {
  double read_one = 0, read_all = 0, copy_one = 0, copy_all = 0;  // bytes/s; copy counts bytes read plus written
  double f32_flops = 0;                                           // FMA
  double bf16_dot_flops = 0;                                      // vdpbf16ps; 0 where absent
  double int8_dot_ops = 0;                                        // vpdpbusd, or maddubs + madd + add on AVX2
  double bf16_tile_flops = 0;                                     // tdpbf16ps; 0 unless the run uses AMX
  double int8_tile_ops = 0;                                       // tdpbssd

  // What bounds the arithmetic of bf16 values and of NVFP4 x NVFP4 on this run's kernels.
  double a16_flops() const { return bf16_tile_flops > 0 ? bf16_tile_flops : f32_flops; }
  double a4_flops() const {  // a tile takes one 16-group where 32 columns fit
    return bf16_tile_flops > 0 ? bf16_tile_flops / 2 : int8_dot_ops > 0 ? int8_dot_ops : f32_flops;
  }
};
Ceilings measure_ceilings(const CpuContext& context);

struct BenchResult {
  std::string op, name;
  int64_t rows = 0;
  double seconds = 0;  // median of one call
  int reps = 0;
  OpCost cost;
  double floor_seconds = 0;  // max(bytes / read_all, flops / peak)
};

class Bench {
 public:
  Bench(const BenchOptions& options, const CpuContext& context, const Ceilings& ceilings,
        std::function<void(const BenchResult&)> report)
      : options_(options), context_(context), ceilings_(ceilings), report_(std::move(report)) {}

  const BenchOptions& options() const { return options_; }
  const CpuContext& context() const { return context_; }
  const Ceilings& ceilings() const { return ceilings_; }
  bool wants(const std::string& name) const { return name.find(options_.filter) != std::string::npos; }

  // call(rep) runs the op once; rep selects the rotated copy of the weights. peak_flops: the ceiling of its arithmetic.
  void measure(const std::string& op, const std::string& name, int64_t rows, const OpCost& cost, double peak_flops,
               const std::function<void(int64_t rep)>& call);

 private:
  BenchOptions options_;
  CpuContext context_;
  Ceilings ceilings_;
  std::function<void(const BenchResult&)> report_;
};

struct BenchOp {
  const char* name;
  const char* help;
  void (*run)(Bench&);
};
std::span<const BenchOp> bench_ops();

// One function per op.
void bench_gemm(Bench& bench);
void bench_moe(Bench& bench);
void bench_attention(Bench& bench);
void bench_indexer(Bench& bench);
void bench_hyper_connection(Bench& bench);
void bench_compressor(Bench& bench);

// A weight that owns its bytes: random codes, scale factors in the middle of their range.
struct RandomWeight {
  std::vector<uint8_t> data, sf;
  std::vector<float> block_scales;
  Weight weight;
};
RandomWeight random_weight(WeightFormat format, int64_t rows, int64_t cols, uint64_t seed);
std::vector<float> random_bf16_values(int64_t count, uint64_t seed);

Json to_json(const Ceilings& ceilings);
Json to_json(const BenchResult& result, const Ceilings& ceilings);

// Operations per second of one core while it runs for about 20 ms; -1 where the instruction is absent.
double peak_f32_sse2();
double peak_f32_avx2();
double peak_int8_avx2();
double peak_f32_avx512();
double peak_int8_avx512();
double peak_bf16_avx512();
double peak_bf16_amx();
double peak_int8_amx();

}  // namespace dsv4::bench
