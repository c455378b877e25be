// Shared by the op tests: deterministic random data, owned weights in every format, the instruction sets of this machine.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "codec/fp8_block.h"
#include "codec/nvfp4.h"
#include "ops/gemm/gemm.h"

namespace dsv4::test {

// The vector instruction sets that this machine can run, the reference excluded.
inline std::vector<CpuIsa> vector_isas() {
  std::vector<CpuIsa> isas;
  for (CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAmx})
    if (isa <= best_cpu_isa()) isas.push_back(isa);
  return isas;
}

inline std::vector<float> random_floats(std::mt19937& rng, int64_t count, float scale, bool bf16_values) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = bf16_values ? round_bf16(normal(rng)) : normal(rng);
  return x;
}

// A weight that owns its bytes: uniformly random codes and scale factors, subnormal and largest ones included.
struct OwnedWeight {
  std::vector<uint8_t> data, sf;
  std::vector<float> block_scales;
  Weight weight;
};

inline OwnedWeight random_weight(std::mt19937& rng, WeightFormat format, int64_t rows, int64_t cols) {
  OwnedWeight w;
  WeightView& v = w.weight.view;
  v.format = format;
  v.rows = rows;
  v.cols = cols;
  std::uniform_int_distribution<int> byte(0, 255);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  switch (format) {
    case WeightFormat::kF32:
      w.data.resize(rows * cols * 4);
      for (int64_t i = 0; i < rows * cols; ++i) {
        const float f = normal(rng);
        std::memcpy(&w.data[i * 4], &f, 4);
      }
      break;
    case WeightFormat::kBf16:
      w.data.resize(rows * cols * 2);
      for (int64_t i = 0; i < rows * cols; ++i) {
        const uint16_t bits = encode_bf16(normal(rng)).bits;
        std::memcpy(&w.data[i * 2], &bits, 2);
      }
      break;
    case WeightFormat::kFp8Block: {
      w.data.resize(rows * cols);
      for (uint8_t& c : w.data) {
        do c = static_cast<uint8_t>(byte(rng));
        while ((c & 0x7f) == 0x7f);
      }
      w.block_scales.resize(((rows + 127) / 128) * ((cols + 127) / 128));
      for (float& s : w.block_scales) s = std::exp2(static_cast<float>(byte(rng) % 8) - 12.0f);
      break;
    }
    case WeightFormat::kNvfp4:
      w.data.resize(rows * cols / 2);
      for (uint8_t& c : w.data) c = static_cast<uint8_t>(byte(rng));
      w.sf.resize(rows * cols / 16);
      for (uint8_t& s : w.sf) s = static_cast<uint8_t>(byte(rng) % 0x7f);
      v.global = GlobalScale{0.00037f};
      break;
  }
  v.data = w.data.data();
  v.sf = w.sf.empty() ? nullptr : w.sf.data();
  v.block_scales = w.block_scales.empty() ? nullptr : w.block_scales.data();
  return w;
}

inline std::string format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return "f32";
    case WeightFormat::kBf16:
      return "bf16";
    case WeightFormat::kFp8Block:
      return "fp8";
    case WeightFormat::kNvfp4:
      return "nvfp4";
  }
  return "?";
}

constexpr WeightFormat kAllFormats[] = {WeightFormat::kF32, WeightFormat::kBf16, WeightFormat::kFp8Block,
                                        WeightFormat::kNvfp4};

}  // namespace dsv4::test
