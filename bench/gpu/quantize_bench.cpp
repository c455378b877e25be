// Quantisers and decoders: bandwidth at sizes larger than L2, microseconds at decode sizes.
#include <random>

#include "gpu_bench.h"
#include "ops/quantize/quantize_gpu.h"

using namespace dsv4;

namespace {

struct Rows {
  gpu::DeviceBuffer x, x2, codes, sf, y, row_global;

  // width: bytes per element of x
  Rows(int64_t rows, int64_t cols, int width, bool two_inputs, RowFormat format, const GpuContext& c, uint32_t seed)
      : x(rows * cols * width),
        x2(two_inputs ? rows * cols * width : 0),
        codes(format == RowFormat::kFp8 ? rows * cols : rows * cols / 2),
        sf((rows + 127) / 128 * 128 * cols / 16),
        y(format == RowFormat::kBf16 ? rows * cols * 2 : 0),
        row_global(rows * 4) {
    if (width == 2) {
      bench::fill_random_bf16(x.data(), rows * cols, seed, c.stream);
      if (two_inputs) bench::fill_random_bf16(x2.data(), rows * cols, seed + 1, c.stream);
    } else {
      bench::fill_random_f32(x.data(), rows * cols, seed, c.stream);
    }
  }
  QuantizedRows out(RowFormat format, GlobalMode global, SfLayout layout = SfLayout::kLinear) const {
    return {.format = format,
            .global_mode = global,
            .sf_layout = layout,
            .codes = codes.as<uint8_t>(),
            .sf = sf.as<uint8_t>(),
            .y = y.as<bf16>(),
            .row_global = row_global.as<float>()};
  }
};

std::string shape_name(int64_t rows, int64_t cols, const char* what) {
  return std::to_string(rows) + "x" + std::to_string(cols) + " " + what;
}

void bench_quantize(bench::Bench& b) {
  constexpr int64_t kCols = 4096;
  struct Case {
    const char* name;
    bool f32;
    RowFormat format;
    GlobalMode global;
    SfLayout layout;
    bool norm;
  };
  const Case cases[] = {
      {"bf16->nvfp4", false, RowFormat::kNvfp4, GlobalMode::kOne, SfLayout::kLinear, false},
      {"bf16->nvfp4 128x4", false, RowFormat::kNvfp4, GlobalMode::kOne, SfLayout::k128x4, false},
      {"bf16->nvfp4 row global", false, RowFormat::kNvfp4, GlobalMode::kComputeRow, SfLayout::kLinear, false},
      {"bf16->norm->nvfp4", false, RowFormat::kNvfp4, GlobalMode::kOne, SfLayout::kLinear, true},
      {"f32->nvfp4", true, RowFormat::kNvfp4, GlobalMode::kOne, SfLayout::kLinear, false},
      {"bf16->fp8", false, RowFormat::kFp8, GlobalMode::kOne, SfLayout::kLinear, false},
  };
  gpu::DeviceBuffer weight(kCols * 2);
  bench::fill_random_bf16(weight.data(), kCols, 99, b.context().stream);
  for (const Case& c : cases) {
    const int width = c.f32 ? 4 : 2;
    for (const int64_t rows : {int64_t{8192}, int64_t{65536}}) {  // bf16: 64 and 512 MiB of input
      const int copies = rows == 8192 ? 8 : 2;
      std::vector<Rows> sets;
      for (int i = 0; i < copies; ++i)
        sets.emplace_back(rows, kCols, width, false, c.format, b.context(), static_cast<uint32_t>(i));
      b.stream("quantize", shape_name(rows, kCols, c.name), quantize_cost(rows, kCols, width, c.format).bytes, "copy",
               copies, [&](const GpuContext& context, int i) {
                 quantize_rows(QuantizeArgs{sets[i].x.data(), c.f32, c.norm ? weight.as<bf16>() : nullptr, 1e-6f, rows,
                                            kCols, kCols, sets[i].out(c.format, c.global, c.layout)},
                               context);
               });
    }
  }
  for (const int64_t rows : {1, 8, 64}) {
    Rows set(rows, kCols, 2, false, RowFormat::kNvfp4, b.context(), 5);
    b.latency("quantize", shape_name(rows, kCols, "norm, row global"), [&](const GpuContext& context, int) {
      quantize_rows(QuantizeArgs{set.x.data(), false, weight.as<bf16>(), 1e-6f, rows, kCols, kCols,
                                 set.out(RowFormat::kNvfp4, GlobalMode::kComputeRow)},
                    context);
    });
  }
}

void bench_swiglu(bench::Bench& b) {
  constexpr int64_t kCols = 2048;
  struct Case {
    const char* name;
    RowFormat format;
    GlobalMode global;
  };
  for (const Case& c :
       {Case{"nvfp4", RowFormat::kNvfp4, GlobalMode::kOne},
        Case{"nvfp4 row global", RowFormat::kNvfp4, GlobalMode::kComputeRow},
        Case{"fp8", RowFormat::kFp8, GlobalMode::kOne}, Case{"bf16", RowFormat::kBf16, GlobalMode::kOne}}) {
    for (const int64_t rows : {int64_t{16384}, int64_t{65536}}) {
      const int copies = rows == 16384 ? 4 : 2;
      std::vector<Rows> sets;
      for (int i = 0; i < copies; ++i)
        sets.emplace_back(rows, kCols, 2, true, c.format, b.context(), static_cast<uint32_t>(i));
      b.stream("swiglu_quantize", shape_name(rows, kCols, c.name), quantize_cost(rows, kCols, 4, c.format).bytes,
               "copy", copies, [&](const GpuContext& context, int i) {
                 swiglu_quantize(SwigluQuantizeArgs{sets[i].x.as<bf16>(), sets[i].x2.as<bf16>(), nullptr, 10.0f, rows,
                                                    kCols, kCols, sets[i].out(c.format, c.global)},
                                 context);
               });
    }
  }
  for (const int64_t rows : {6, 48, 384}) {  // 1, 8, 64 tokens, six experts each
    Rows set(rows, kCols, 2, true, RowFormat::kNvfp4, b.context(), 5);
    b.latency("swiglu_quantize", shape_name(rows, kCols, "row global"), [&](const GpuContext& context, int) {
      swiglu_quantize(SwigluQuantizeArgs{set.x.as<bf16>(), set.x2.as<bf16>(), nullptr, 10.0f, rows, kCols, kCols,
                                         set.out(RowFormat::kNvfp4, GlobalMode::kComputeRow)},
                      context);
    });
  }
}

void bench_inverse_rope(bench::Bench& b) {
  constexpr int kHeads = 64, kHeadDim = 512, kRopeDim = 64;
  gpu::DeviceBuffer cos_sin(8192 * kRopeDim * 4), positions(16384 * 4);
  bench::fill_random_f32(cos_sin.data(), 8192 * kRopeDim, 3, b.context().stream);
  std::vector<int32_t> host(16384);
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<int32_t>(i % 8192);
  gpu::copy_to_device(positions.data(), host.data(), 16384 * 4, b.context().stream);
  struct Case {
    const char* name;
    RowFormat format;
  };
  for (const Case& c :
       {Case{"nvfp4", RowFormat::kNvfp4}, Case{"fp8", RowFormat::kFp8}, Case{"bf16", RowFormat::kBf16}}) {
    for (const int64_t tokens : {int64_t{1024}, int64_t{8192}}) {  // 64 and 512 MiB
      const int64_t rows = tokens * 8, cols = 8 * kHeadDim;
      const int copies = tokens == 1024 ? 8 : 2;
      std::vector<Rows> sets;
      for (int i = 0; i < copies; ++i)
        sets.emplace_back(rows, cols, 2, false, c.format, b.context(), static_cast<uint32_t>(i));
      b.stream("inverse_rope_quantize", std::to_string(tokens) + " tokens x64 heads " + c.name,
               quantize_cost(rows, cols, 2, c.format).bytes + 256.0 * tokens, "copy", copies,
               [&](const GpuContext& context, int i) {
                 inverse_rope_quantize(
                     InverseRopeQuantizeArgs{sets[i].x.as<bf16>(), cos_sin.as<float>(), positions.as<int32_t>(), tokens,
                                             kHeads, kHeadDim, kRopeDim, 8, sets[i].out(c.format, GlobalMode::kOne)},
                     context);
               });
    }
  }
  for (const int64_t tokens : {1, 8, 64}) {
    Rows set(tokens * 8, 4096, 2, false, RowFormat::kFp8, b.context(), 5);
    b.latency("inverse_rope_quantize", std::to_string(tokens) + " tokens x64 heads fp8",
              [&](const GpuContext& context, int) {
                inverse_rope_quantize(
                    InverseRopeQuantizeArgs{set.x.as<bf16>(), cos_sin.as<float>(), positions.as<int32_t>(), tokens,
                                            kHeads, kHeadDim, kRopeDim, 8, set.out(RowFormat::kFp8, GlobalMode::kOne)},
                    context);
              });
  }
}

void bench_dequantize(bench::Bench& b) {
  constexpr int64_t kRows = 65536, kCols = 4096;
  gpu::DeviceBuffer codes(kRows * kCols / 2), sf(kRows * kCols / 16), y(kRows * kCols * 4), global(4);
  bench::fill_random(codes.data(), codes.bytes(), 1, b.context().stream);
  bench::fill_random_sf(sf.data(), sf.bytes(), 2, b.context().stream);
  bench::fill_random_f32(global.data(), 1, 3, b.context().stream);
  struct Case {
    const char* name;
    GlobalMode global;
    SfLayout layout;
    bool f32;
  };
  for (const Case& c : {Case{"nvfp4->bf16", GlobalMode::kOne, SfLayout::kLinear, false},
                        Case{"nvfp4->bf16 global", GlobalMode::kGiven, SfLayout::kLinear, false},
                        Case{"nvfp4 128x4->bf16", GlobalMode::kGiven, SfLayout::k128x4, false},
                        Case{"nvfp4->f32 global", GlobalMode::kGiven, SfLayout::kLinear, true}})
    for (const int64_t rows : {int64_t{16384}, kRows}) {
      const int width = c.f32 ? 4 : 2;
      const int copies = static_cast<int>(kRows / rows);
      b.stream("dequantize", shape_name(rows, kCols, c.name), dequantize_cost(rows, kCols, width).bytes, "copy", copies,
               [&](const GpuContext& context, int i) {
                 const int64_t at = i * rows * kCols;
                 dequantize_rows(DequantizeArgs{codes.as<uint8_t>() + at / 2, sf.as<uint8_t>() + at / 16,
                                                global.as<float>(), nullptr, nullptr, y.as<uint8_t>() + at * width,
                                                c.f32, c.global, c.layout, rows, rows, kCols},
                                 context);
               });
    }
  {
    gpu::DeviceBuffer scales(kRows / 128 * kCols / 128 * 4), fp8(kRows * kCols);
    bench::fill_random_sf(fp8.data(), fp8.bytes(), 7, b.context().stream);
    bench::fill_random_f32(scales.data(), scales.bytes() / 4, 8, b.context().stream);
    b.stream("dequantize_fp8_blocks", shape_name(kRows, kCols, "e4m3->bf16"), 3.0 * kRows * kCols, "copy", 2,
             [&](const GpuContext& context, int) {
               dequantize_fp8_blocks({fp8.as<uint8_t>(), scales.as<float>(), y.as<bf16>(), kRows, kCols}, context);
             });
  }
  // 512 of one million rows for each of 128 sequences.
  constexpr int64_t kPool = 1 << 20, kGather = 128 * 512;
  gpu::DeviceBuffer pool_codes(kPool * 512 / 2), pool_sf(kPool * 512 / 16);
  bench::fill_random(pool_codes.data(), pool_codes.bytes(), 1, b.context().stream);
  bench::fill_random_sf(pool_sf.data(), pool_sf.bytes(), 2, b.context().stream);
  for (const int64_t cols : {int64_t{512}, int64_t{128}}) {
    std::mt19937 random(1);
    std::vector<int32_t> host(4 * kGather);
    for (int32_t& row : host) row = static_cast<int32_t>(random() % kPool);
    gpu::DeviceBuffer rows(static_cast<int64_t>(host.size()) * 4), bad(4);
    gpu::copy_to_device(rows.data(), host.data(), rows.bytes(), b.context().stream);
    b.stream("dequantize_rows", std::to_string(kGather) + " of 1M rows of " + std::to_string(cols) + " ->bf16",
             dequantize_cost(kGather, cols, 2).bytes + 4.0 * kGather, "copy", 4, [&](const GpuContext& context, int i) {
               dequantize_rows(DequantizeArgs{pool_codes.as<uint8_t>(), pool_sf.as<uint8_t>(), nullptr,
                                              rows.as<int32_t>() + i * kGather, bad.as<int32_t>(),
                                              y.as<uint8_t>() + i * kGather * cols * 2, false, GlobalMode::kOne,
                                              SfLayout::kLinear, kPool, kGather, cols},
                               context);
             });
  }
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run(argc, argv, [](bench::Bench& b) {
    bench_quantize(b);
    bench_dequantize(b);
    bench_swiglu(b);
    bench_inverse_rope(b);
  });
}
