// Decoders: device bytes equal the CPU reference's, dense and gathered, for every code and scale.
#include <algorithm>

#include "gpu/gpu_test.h"
#include "ops/quantize/quantize_gpu.h"

namespace dsv4::test {
namespace {

std::vector<uint8_t> random_bytes(int64_t count, uint32_t seed, uint32_t modulus) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random() % modulus);
  return bytes;
}

struct Case {
  int64_t rows, cols;
  GlobalMode global;
  SfLayout layout;
  bool f32;
};

void expect_parity(Machine& machine, const Case& c, const std::vector<int32_t>& rows) {
  const bool gather = !rows.empty();
  const int64_t num_out = gather ? static_cast<int64_t>(rows.size()) : c.rows;
  const std::vector<uint8_t> codes = random_bytes(c.rows * c.cols / 2, 1, 256),
                             sf = random_bytes(sf_bytes(c.layout, c.rows, c.cols / 16), 2, 127);
  std::vector<float> globals(static_cast<size_t>(c.rows));
  for (size_t i = 0; i < globals.size(); ++i) globals[i] = 0.0173f * static_cast<float>(i % 11 + 1);
  const int64_t y_bytes = num_out * c.cols * (c.f32 ? 4 : 2);
  std::vector<uint8_t> want(static_cast<size_t>(y_bytes));
  int32_t want_bad = 0;
  DequantizeArgs args{codes.data(), sf.data(),   globals.data(), gather ? rows.data() : nullptr,
                      &want_bad,    want.data(), c.f32,          c.global,
                      c.layout,     c.rows,      num_out,        c.cols};
  dequantize_rows(args, machine.cpu);

  DeviceArray<uint8_t> device_codes(machine, codes), device_sf(machine, sf), y(machine, y_bytes);
  DeviceArray<float> device_globals(machine, globals);
  DeviceArray<int32_t> device_rows(machine, rows), bad(machine, std::vector<int32_t>{0});
  args.codes = device_codes.data(), args.sf = device_sf.data(), args.global = device_globals.data(), args.y = y.data(),
  args.bad_rows = bad.data();
  args.rows = gather ? device_rows.data() : nullptr;
  dequantize_rows(args, machine.gpu);
  expect_same_bytes(y.host(), want, "decoded rows");
  EXPECT_EQ(bad.host()[0], want_bad);
}

TEST(GpuDequantize, DenseRowsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const bool f32 : {false, true})
    for (const GlobalMode global : {GlobalMode::kOne, GlobalMode::kGiven, GlobalMode::kPerRow})
      for (const SfLayout layout : {SfLayout::kLinear, SfLayout::k128x4})
        for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 16}, {3, 48}, {130, 4096}, {1500, 4096}})
          expect_parity(machine, {rows, cols, global, layout, f32}, {});
}

TEST(GpuDequantize, GatheredRowsEqualReferenceAndBadIndicesAreCountedNotRead) {
  DSV4_NEEDS_GPU();
  Machine machine;
  std::mt19937 random(3);
  std::vector<int32_t> rows;
  for (int i = 0; i < 7003; ++i) rows.push_back(static_cast<int32_t>(random() % 700));
  for (size_t i = 0; i < rows.size(); i += 9) rows[i] = -1;
  rows[4] = 700, rows[40] = -2, rows[400] = 0x7fffffff, rows[4000] = INT32_MIN;
  for (const GlobalMode global : {GlobalMode::kOne, GlobalMode::kPerRow}) {
    expect_parity(machine, {700, 512, global, SfLayout::kLinear, false}, rows);
    expect_parity(machine, {700, 128, global, SfLayout::kLinear, true}, rows);
  }
  expect_parity(machine, {700, 512, GlobalMode::kOne, SfLayout::kLinear, false}, {-1});
}

TEST(GpuDequantize, EveryCodeUnderEveryScaleEqualsReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  std::vector<uint8_t> codes, sf;  // 127 rows of one group: all 16 codes under each finite scale
  for (int scale = 0; scale < 127; ++scale) {
    for (int j = 0; j < 8; ++j)
      codes.push_back(pack_e2m1x2(static_cast<uint8_t>(2 * j), static_cast<uint8_t>(2 * j + 1)));
    sf.push_back(static_cast<uint8_t>(scale));
  }
  std::vector<bf16> want(127 * 16);
  DequantizeArgs args{codes.data(), sf.data(),        nullptr,           nullptr, nullptr, want.data(),
                      false,        GlobalMode::kOne, SfLayout::kLinear, 127,     127,     16};
  dequantize_rows(args, machine.cpu);
  DeviceArray<uint8_t> device_codes(machine, codes), device_sf(machine, sf);
  DeviceArray<bf16> y(machine, 127 * 16);
  args.codes = device_codes.data(), args.sf = device_sf.data(), args.y = y.data();
  dequantize_rows(args, machine.gpu);
  expect_same_bytes(y.host(), want, "decoded values");
}

TEST(GpuDequantize, RoundTripThroughTheQuantiserStaysWithinHalfAStep) {
  DSV4_NEEDS_GPU();
  Machine machine;
  constexpr int64_t kRows = 64, kCols = 1024;
  const std::vector<bf16> x = to_bf16(random_rows(kRows, kCols, 11));
  DeviceArray<bf16> device_x(machine, x), y(machine, kRows * kCols);
  DeviceArray<uint8_t> codes(machine, kRows * kCols / 2), sf(machine, kRows * kCols / 16);
  DeviceArray<float> globals(machine, kRows);
  quantize_rows(QuantizeArgs{device_x.data(), false, nullptr, 0, kRows, kCols, kCols,
                             QuantizedRows{.global_mode = GlobalMode::kComputeRow,
                                           .codes = codes.data(),
                                           .sf = sf.data(),
                                           .row_global = globals.data()}},
                machine.gpu);
  dequantize_rows(DequantizeArgs{codes.data(), sf.data(), globals.data(), nullptr, nullptr, y.data(), false,
                                 GlobalMode::kPerRow, SfLayout::kLinear, kRows, kRows, kCols},
                  machine.gpu);
  const std::vector<bf16> back = y.host();
  for (int64_t row = 0; row < kRows; ++row) {
    float amax_row = 0;
    for (int64_t c = 0; c < kCols; ++c) amax_row = std::max(amax_row, std::fabs(decode_bf16(x[row * kCols + c])));
    for (int64_t g = 0; g < kCols / 16; ++g) {
      float amax = 0;
      for (int j = 0; j < 16; ++j) amax = std::max(amax, std::fabs(decode_bf16(x[row * kCols + g * 16 + j])));
      // Half of the widest e2m1 step (1 of 6), the scale's own rounding (1/16), and the smallest scale's step.
      const float bound = amax * (1.0f / 6 + 1.0f / 16) + amax_row / 2688 * 6 * 0x1p-9f;
      for (int j = 0; j < 16; ++j) {
        const int64_t at = row * kCols + g * 16 + j;
        ASSERT_NEAR(decode_bf16(back[at]), decode_bf16(x[at]), bound) << "row " << row << " column " << g * 16 + j;
      }
    }
  }
}

TEST(GpuDequantizeFp8Blocks, EqualsReferenceForFiniteCodesAndKeepsNan) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 16}, {130, 256}, {300, 4096}}) {
    std::vector<uint8_t> codes = random_bytes(rows * cols, 4, 256);
    for (uint8_t& code : codes)
      if ((code & 0x7f) == 0x7f) code ^= 1;
    std::vector<float> scales(static_cast<size_t>((rows + 127) / 128 * ((cols + 127) / 128)));
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = i % 2 ? 0.0625f : 0.0173f * static_cast<float>(i + 1);
    std::vector<bf16> want(static_cast<size_t>(rows * cols));
    dequantize_fp8_blocks({codes.data(), scales.data(), want.data(), rows, cols}, machine.cpu);
    DeviceArray<uint8_t> device_codes(machine, codes);
    DeviceArray<float> device_scales(machine, scales);
    DeviceArray<bf16> y(machine, rows * cols);
    dequantize_fp8_blocks({device_codes.data(), device_scales.data(), y.data(), rows, cols}, machine.gpu);
    expect_same_bytes(y.host(), want, "decoded weights");
  }
  DeviceArray<uint8_t> nan_codes(machine, std::vector<uint8_t>(16, 0xff));
  DeviceArray<float> one(machine, std::vector<float>{1.0f});
  DeviceArray<bf16> y(machine, 16);
  dequantize_fp8_blocks({nan_codes.data(), one.data(), y.data(), 1, 16}, machine.gpu);
  for (const bf16 value : y.host()) EXPECT_TRUE(std::isnan(decode_bf16(value)));
}

}  // namespace
}  // namespace dsv4::test
