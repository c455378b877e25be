// Timing, the list of ops, random data, JSON.
#include "bench/bench.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/check.h"

namespace dsv4::bench {
namespace {

constexpr BenchOp kOps[] = {
    {"gemm", "expert and dense matrices: bf16, fp8, nvfp4 with f32, bf16 (a16) and nvfp4 (a4) activations", bench_gemm},
    {"moe", "one mixture-of-experts layer with its shared expert, a16 and a4", bench_moe},
    {"attention", "one layer's attention at 64K tokens of context, every cache row format", bench_attention},
    {"indexer", "scores and top-k of 64K tokens of context, every key format", bench_indexer},
    {"hyper_connection", "pre and post of one site", bench_hyper_connection},
    {"compressor", "CSA and HCA compression of a chunk", bench_compressor},
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

void fill_random(std::vector<uint8_t>& bytes, uint64_t& state) {
  size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    const uint64_t r = next_random(state);
    std::memcpy(&bytes[i], &r, 8);
  }
  for (; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(next_random(state));
}

}  // namespace

std::span<const BenchOp> bench_ops() { return kOps; }

ModelShape model_shape(const std::string& name) {
  if (name == "flash") return {4096, 2048, 256, 6};
  if (name == "pro") return {7168, 3072, 384, 6};
  if (name == "demo") return {256, 128, 16, 4};
  throw_usage("shape {} is none of flash, pro, demo", name);
}

void Bench::measure(const std::string& op, const std::string& name, int64_t rows, const OpCost& cost, double peak_flops,
                    const std::function<void(int64_t rep)>& call) {
  int64_t rep = 0;
  for (; rep < 2; ++rep) call(rep);
  std::vector<double> seconds;
  const double begin = now();
  while (true) {
    const double start = now();
    call(rep++);
    const double end = now();
    seconds.push_back(end - start);
    const int count = static_cast<int>(seconds.size());
    if (count >= options_.min_reps && end - begin >= options_.min_seconds) break;
    if (count >= 3 && end - begin >= options_.max_seconds) break;
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  BenchResult result{op, name, rows, seconds[seconds.size() / 2], static_cast<int>(seconds.size()), cost, 0};
  result.floor_seconds = std::max(cost.bytes / ceilings_.read_all, peak_flops > 0 ? cost.flops / peak_flops : 0.0);
  report_(result);
}

RandomWeight random_weight(WeightFormat format, int64_t rows, int64_t cols, uint64_t seed) {
  RandomWeight w;
  WeightView& v = w.weight.view;
  v.format = format;
  v.rows = rows;
  v.cols = cols;
  uint64_t state = seed;
  switch (format) {
    case WeightFormat::kF32:
    case WeightFormat::kBf16: {
      const int64_t width = format == WeightFormat::kF32 ? 4 : 2;
      w.data.resize(static_cast<size_t>(rows * cols * width));
      fill_random(w.data, state);
      // Exponents near 2^-4: finite, neither vanishing nor overflowing in sums.
      for (int64_t i = width - 1; i < rows * cols * width; i += width)
        w.data[i] = static_cast<uint8_t>((w.data[i] & 0x80) | 0x3d);
      break;
    }
    case WeightFormat::kFp8Block:
      w.data.resize(static_cast<size_t>(rows * cols));
      fill_random(w.data, state);
      for (uint8_t& c : w.data)
        if ((c & 0x7f) == 0x7f) c ^= 1;
      w.block_scales.assign(static_cast<size_t>((rows + 127) / 128 * ((cols + 127) / 128)), 0x1p-8f);
      break;
    case WeightFormat::kNvfp4:
      w.data.resize(static_cast<size_t>(rows * cols / 2));
      w.sf.resize(static_cast<size_t>(rows * cols / 16));
      fill_random(w.data, state);
      fill_random(w.sf, state);
      for (uint8_t& s : w.sf) s = static_cast<uint8_t>(0x20 + (s & 0x1f));
      v.global = GlobalScale{0.01f};
      break;
  }
  v.data = w.data.data();
  v.sf = w.sf.data();
  v.block_scales = w.block_scales.data();
  return w;
}

std::vector<float> random_bf16_values(int64_t count, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(count));
  uint64_t state = seed;
  for (float& v : x)
    v = round_bf16(static_cast<float>(static_cast<int64_t>(next_random(state) >> 40) - (1 << 23)) * 0x1p-22f);
  return x;
}

Json to_json(const Ceilings& c) {
  return {{"read_one_gbs", c.read_one / 1e9},       {"read_all_gbs", c.read_all / 1e9},
          {"copy_one_gbs", c.copy_one / 1e9},       {"copy_all_gbs", c.copy_all / 1e9},
          {"f32_gflops", c.f32_flops / 1e9},        {"bf16_dot_gflops", c.bf16_dot_flops / 1e9},
          {"int8_dot_gops", c.int8_dot_ops / 1e9},  {"bf16_tile_gflops", c.bf16_tile_flops / 1e9},
          {"int8_tile_gops", c.int8_tile_ops / 1e9}};
}

Json to_json(const BenchResult& r, const Ceilings& c) {
  return {{"op", r.op},
          {"name", r.name},
          {"rows", r.rows},
          {"seconds", r.seconds},
          {"reps", r.reps},
          {"bytes", r.cost.bytes},
          {"flops", r.cost.flops},
          {"gbs", r.cost.bytes / r.seconds / 1e9},
          {"gflops", r.cost.flops / r.seconds / 1e9},
          {"share_of_floor", r.floor_seconds / r.seconds},
          {"share_of_read", r.cost.bytes / r.seconds / c.read_all}};
}

}  // namespace dsv4::bench
