// Every quantiser, format, global mode and layout: device bytes equal the CPU reference's, and no byte is left unwritten.
#include "ops/quantize/quantize_gpu.h"

#include <string>

#include "gpu/gpu_test.h"

namespace dsv4::test {
namespace {

struct Case {
  int64_t rows, cols;
  RowFormat format = RowFormat::kNvfp4;
  GlobalMode global = GlobalMode::kOne;
  SfLayout layout = SfLayout::kLinear;

  std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(cols) + " format " + std::to_string(static_cast<int>(format)) +
           " global " + std::to_string(static_cast<int>(global)) + " layout " +
           std::to_string(static_cast<int>(layout));
  }
};

// All results of one quantiser call, on one side.
struct Results {
  std::vector<uint8_t> codes, sf;
  std::vector<bf16> y;
  std::vector<float> row_global;
};

int64_t code_bytes(const Case& c) {
  return c.format == RowFormat::kNvfp4 ? c.rows * c.cols / 2 : c.format == RowFormat::kFp8 ? c.rows * c.cols : 0;
}

std::vector<float> globals_for(const Case& c) {
  std::vector<float> globals(static_cast<size_t>(c.global == GlobalMode::kPerRow ? c.rows : 1));
  for (size_t i = 0; i < globals.size(); ++i) globals[i] = 0.013f * static_cast<float>(i % 5 + 1);
  return globals;
}

// Runs op(out, context) on both sides with equal settings and compares everything it wrote.
template <class Op>
void expect_parity(Machine& machine, const Case& c, bool with_y, int64_t sf_matrix_rows, const Op& op) {
  SCOPED_TRACE(c.name());
  QuantizedRows out{
      .format = c.format, .global_mode = c.global, .sf_layout = c.layout, .sf_matrix_rows = sf_matrix_rows};
  const std::vector<float> globals = globals_for(c);
  const bool has_y = with_y || c.format == RowFormat::kBf16;
  const int64_t sf_size = quantized_sf_bytes(out, c.rows, c.cols);

  Results want;
  want.codes.resize(static_cast<size_t>(code_bytes(c)));
  want.sf.resize(static_cast<size_t>(sf_size));
  want.y.resize(static_cast<size_t>(has_y ? c.rows * c.cols : 0));
  want.row_global.resize(static_cast<size_t>(c.global == GlobalMode::kComputeRow ? c.rows : 0));
  QuantizedRows host_out = out;
  host_out.codes = want.codes.data(), host_out.sf = want.sf.data(), host_out.y = has_y ? want.y.data() : nullptr;
  host_out.global = globals.data(), host_out.row_global = want.row_global.data();
  op(host_out, machine.cpu);

  DeviceArray<uint8_t> codes(machine, code_bytes(c)), sf(machine, sf_size);
  DeviceArray<bf16> y(machine, static_cast<int64_t>(want.y.size()));
  DeviceArray<float> row_global(machine, static_cast<int64_t>(want.row_global.size())),
      device_globals(machine, globals);
  QuantizedRows device_out = out;
  device_out.codes = codes.data(), device_out.sf = sf.data(), device_out.y = has_y ? y.data() : nullptr;
  device_out.global = device_globals.data(), device_out.row_global = row_global.data();
  op(device_out, machine.gpu);

  expect_same_bytes(codes.host(), want.codes, "codes");
  expect_same_bytes(sf.host(), want.sf, "scale factors");
  expect_same_bytes(y.host(), want.y, "bf16 rows");
  expect_same_bytes(row_global.host(), want.row_global, "row globals");
}

const Case kCases[] = {
    {1, 16},
    {3, 48},
    {5, 4096},
    {64, 4096},
    {300, 7168},
    {1031, 512},
    {7, 4096, RowFormat::kNvfp4, GlobalMode::kGiven},
    {7, 4096, RowFormat::kNvfp4, GlobalMode::kPerRow},
    {70, 4096, RowFormat::kNvfp4, GlobalMode::kComputeRow},
    {9, 7168, RowFormat::kNvfp4, GlobalMode::kComputeRow},
    {3, 16384, RowFormat::kNvfp4, GlobalMode::kComputeRow},
    {3, 48, RowFormat::kNvfp4, GlobalMode::kComputeRow},
    {1, 16, RowFormat::kNvfp4, GlobalMode::kOne, SfLayout::k128x4},
    {130, 80, RowFormat::kNvfp4, GlobalMode::kGiven, SfLayout::k128x4},
    {257, 4096, RowFormat::kNvfp4, GlobalMode::kComputeRow, SfLayout::k128x4},
    {5, 4096, RowFormat::kFp8},
    {131, 128, RowFormat::kFp8},
    {300, 7168, RowFormat::kFp8},
    {5, 4096, RowFormat::kBf16},
    {4000, 4096},
};

TEST(GpuQuantize, DenseBf16RowsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const Case& c : kCases) {
    const std::vector<bf16> x = to_bf16(random_rows(c.rows, c.cols, 1));
    DeviceArray<bf16> device_x(machine, x);
    expect_parity(machine, c, false, 0, [&](const QuantizedRows& out, const auto& context) {
      constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
      quantize_rows(QuantizeArgs{kGpu ? device_x.data() : x.data(), false, nullptr, 0, c.rows, c.cols, c.cols, out},
                    context);
    });
  }
}

TEST(GpuQuantize, DenseBinary32RowsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const Case& c : kCases) {
    const std::vector<float> x = random_rows(c.rows, c.cols, 2);
    DeviceArray<float> device_x(machine, x);
    expect_parity(machine, c, false, 0, [&](const QuantizedRows& out, const auto& context) {
      constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
      quantize_rows(QuantizeArgs{kGpu ? device_x.data() : x.data(), true, nullptr, 0, c.rows, c.cols, c.cols, out},
                    context);
    });
  }
}

TEST(GpuQuantize, RmsNormInFrontEqualsReferenceAndWritesTheNormalisedRow) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const Case& c : kCases) {
    const std::vector<bf16> x = to_bf16(random_rows(c.rows, c.cols, 3)), weight = to_bf16(random_rows(1, c.cols, 4));
    DeviceArray<bf16> device_x(machine, x), device_weight(machine, weight);
    expect_parity(machine, c, true, 0, [&](const QuantizedRows& out, const auto& context) {
      constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
      quantize_rows(QuantizeArgs{kGpu ? device_x.data() : x.data(), false, kGpu ? device_weight.data() : weight.data(),
                                 1e-6f, c.rows, c.cols, c.cols, out},
                    context);
    });
  }
}

TEST(GpuQuantize, StridedRowsAndNonFiniteElementsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const GlobalMode mode : {GlobalMode::kOne, GlobalMode::kComputeRow}) {
    const Case c{64, 512, RowFormat::kNvfp4, mode};
    const int64_t stride = 520;
    std::vector<float> x = random_rows(c.rows, stride, 5);
    for (size_t i = 0; i < x.size(); i += 37) x[i] = i % 2 ? INFINITY : NAN;
    for (size_t i = 5; i < x.size(); i += 101) x[i] = i % 2 ? -INFINITY : 3e38f;
    DeviceArray<float> device_x(machine, x);
    expect_parity(machine, c, false, 0, [&](const QuantizedRows& out, const auto& context) {
      constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
      quantize_rows(QuantizeArgs{kGpu ? device_x.data() : x.data(), true, nullptr, 0, c.rows, c.cols, stride, out},
                    context);
    });
  }
}

// Calls long enough for the ring kernel (quantize_launch.cuh): pieces of rows, shorter last pieces, padded 128x4 matrices, NaN groups.
// dependent launches take the ring from half a million vectors on; on a machine of few multiprocessors every stage is used often.
std::vector<float> rows_with_nan(const Case& c, uint32_t seed) {
  std::vector<float> x = random_rows(c.rows, c.cols, seed);
  for (size_t i = 0; i < x.size(); i += 4099) x[i] = i % 2 ? INFINITY : NAN;
  return x;
}

// x: [c.rows, stride]
void expect_dense_parity(Machine& machine, const Case& c, const std::vector<bf16>& x, int64_t stride,
                         int64_t sf_matrix_rows = 0) {
  DeviceArray<bf16> device_x(machine, x);
  expect_parity(machine, c, false, sf_matrix_rows, [&](const QuantizedRows& out, const auto& context) {
    constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
    quantize_rows(QuantizeArgs{kGpu ? device_x.data() : x.data(), false, nullptr, 0, c.rows, c.cols, stride, out},
                  context);
  });
}
void expect_normalised_parity(Machine& machine, const Case& c, const std::vector<bf16>& x, float eps, bool with_y) {
  const std::vector<bf16> weight = to_bf16(random_rows(1, c.cols, 4));
  DeviceArray<bf16> device_x(machine, x), device_weight(machine, weight);
  expect_parity(machine, c, with_y, 0, [&](const QuantizedRows& out, const auto& context) {
    constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
    quantize_rows(QuantizeArgs{kGpu ? device_x.data() : x.data(), false, kGpu ? device_weight.data() : weight.data(),
                               eps, c.rows, c.cols, c.cols, out},
                  context);
  });
}
// gate, up: [c.rows, stride]
void expect_swiglu_parity(Machine& machine, const Case& c, const std::vector<bf16>& gate, const std::vector<bf16>& up,
                          int64_t stride, bool weighted) {
  const std::vector<float> rho = random_rows(1, c.rows, 8);
  DeviceArray<bf16> device_gate(machine, gate), device_up(machine, up);
  DeviceArray<float> device_rho(machine, rho);
  expect_parity(machine, c, false, 0, [&](const QuantizedRows& out, const auto& context) {
    constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
    swiglu_quantize(SwigluQuantizeArgs{kGpu ? device_gate.data() : gate.data(), kGpu ? device_up.data() : up.data(),
                                       !weighted ? nullptr
                                       : kGpu    ? device_rho.data()
                                                 : rho.data(),
                                       10.0f, c.rows, c.cols, stride, out},
                    context);
  });
}

TEST(GpuQuantizeRing, DenseRowsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  machine.gpu.dependent = true;
  machine.gpu.num_sms = 10;
  for (const Case& c : {Case{2200, 512, RowFormat::kNvfp4, GlobalMode::kComputeRow},
                        Case{4300, 1536, RowFormat::kNvfp4, GlobalMode::kComputeRow},
                        Case{1200, 7168, RowFormat::kNvfp4, GlobalMode::kGiven},
                        Case{1200, 7168, RowFormat::kNvfp4, GlobalMode::kPerRow},
                        Case{2112, 4096, RowFormat::kNvfp4, GlobalMode::kOne, SfLayout::k128x4},
                        Case{1200, 7168, RowFormat::kNvfp4, GlobalMode::kPerRow, SfLayout::k128x4}})
    expect_dense_parity(machine, c, to_bf16(rows_with_nan(c, 1)), c.cols,
                        c.layout == SfLayout::k128x4 ? c.rows / 3 : 0);
}

TEST(GpuQuantizeRing, NormalisedRowsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  machine.gpu.num_sms = 10;
  for (const bool with_y : {false, true})
    for (const Case& c :
         {Case{2200, 512}, Case{4300, 1536, RowFormat::kNvfp4, GlobalMode::kComputeRow},
          Case{2200, 7168, RowFormat::kNvfp4, GlobalMode::kComputeRow}, Case{2200, 512, RowFormat::kFp8}})
      expect_normalised_parity(machine, c, to_bf16(random_rows(c.rows, c.cols, 3)), 1e-6f, with_y);
}

// What the quick sum of squares (quantize_ring.cuh) must leave to the careful one: rows of zeros, subnormals, magnitudes from 2^-133 to
// 2^127, infinities and NaN; and tiny elements beside ordinary ones, which it may lose.
std::vector<bf16> extreme_rows(const Case& c) {
  std::vector<float> x = random_rows(c.rows, c.cols, 9);
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t col = 0; col < c.cols; ++col) {
      float& value = x[static_cast<size_t>(row * c.cols + col)];
      if (row % 7 < 4) value = std::ldexp(value, static_cast<int>(row % 260) - 133);
      if (row % 7 == 4 && (row % 2 || col % 3 == 0)) value = col % 2 ? 0.0f : -0.0f;
      if (row % 7 == 5 && col % 5 != 0) value = std::ldexp(value, -static_cast<int>(col % 133));
      if (row % 7 == 6 && col == row % c.cols) value = row % 2 ? NAN : INFINITY;
    }
  return to_bf16(x);
}

TEST(GpuQuantizeRing, NormalisedRowsOfExtremesEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const GlobalMode mode : {GlobalMode::kOne, GlobalMode::kComputeRow}) {
    const Case c{2200, 512, RowFormat::kNvfp4, mode};
    const std::vector<bf16> x = extreme_rows(c);
    for (const float eps : {1e-6f, 1e-37f}) expect_normalised_parity(machine, c, x, eps, false);
  }
}

TEST(GpuQuantizeRing, SwigluRowsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  machine.gpu.num_sms = 2;  // of a small machine this is a long call
  for (const bool weighted : {true, false}) {
    const Case c{2200, 1536, RowFormat::kNvfp4, GlobalMode::kComputeRow};
    expect_swiglu_parity(machine, c, to_bf16(rows_with_nan(c, 6)), to_bf16(random_rows(c.rows, c.cols, 7)), c.cols,
                         weighted);
  }
}

// Rows of the widths that quantize_team is compiled for. Two multiprocessors: teams hold many rows in turn, and the numbers of rows give
// every number of teams a CTA (quantize_launch.cuh): some idle, all busy, a last round of a few.
TEST(GpuQuantizeTeam, RowsWithTheirOwnGlobalEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  machine.gpu.num_sms = 2;
  for (const int64_t rows : {8, 13, 301}) {
    const Case c{rows, 4096, RowFormat::kNvfp4, GlobalMode::kComputeRow};
    expect_dense_parity(machine, c, to_bf16(rows_with_nan({rows, 4120}, 1)), 4120);
    expect_dense_parity(machine, c, extreme_rows(c), c.cols);
  }
}

TEST(GpuQuantizeTeam, NormalisedRowsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  machine.gpu.num_sms = 2;
  machine.gpu.dependent = true;
  for (const GlobalMode mode : {GlobalMode::kOne, GlobalMode::kGiven, GlobalMode::kPerRow, GlobalMode::kComputeRow})
    for (const int64_t rows : {16, 17, 24, 128, 301}) {
      const Case c{rows, 4096, RowFormat::kNvfp4, mode};
      expect_normalised_parity(machine, c, to_bf16(random_rows(c.rows, c.cols, 3)), 1e-6f, rows != 17);
      expect_normalised_parity(machine, c, extreme_rows(c), rows % 2 ? 1e-6f : 1e-37f, false);
    }
}

TEST(GpuQuantizeTeam, SwigluRowsEqualReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  machine.gpu.num_sms = 2;
  for (const bool weighted : {true, false})
    for (const int64_t rows : {80, 209, 384, 1001}) {  // two warps a row, then one
      const Case c{rows, 2048, RowFormat::kNvfp4, GlobalMode::kComputeRow}, strided{rows, 2064};
      expect_swiglu_parity(machine, c, to_bf16(rows_with_nan(strided, 6)), to_bf16(rows_with_nan(strided, 7)),
                           strided.cols, weighted);
      expect_swiglu_parity(machine, c, extreme_rows(c), to_bf16(random_rows(c.rows, c.cols, 7)), c.cols, weighted);
    }
}

TEST(GpuQuantizeRing, InverseRopeEqualsReference) {
  DSV4_NEEDS_GPU();
  Machine machine;
  machine.gpu.dependent = true;
  constexpr int kHeadDim = 512, kPositions = 300;
  constexpr int64_t kTokens = 280;
  std::vector<int32_t> positions;
  for (int64_t t = 0; t < kTokens; ++t) positions.push_back(static_cast<int32_t>((t * 97 + 3) % kPositions));
  DeviceArray<int32_t> device_positions(machine, positions);
  machine.gpu.num_sms = 10;
  for (const int rope_dim : {64, 32})
    for (const Case& c : {Case{kTokens * 8, 8 * kHeadDim}, Case{kTokens * 8, 8 * kHeadDim, RowFormat::kFp8},
                          Case{kTokens * 8, 8 * kHeadDim, RowFormat::kNvfp4, GlobalMode::kComputeRow}}) {
      std::vector<float> cos_sin;
      for (int p = 0; p < kPositions; ++p)
        for (int i = 0; i < rope_dim; ++i)
          cos_sin.push_back(i < rope_dim / 2 ? std::cos(0.37f * p * (i + 1))
                                             : std::sin(0.37f * p * (i + 1 - rope_dim / 2)));
      DeviceArray<float> device_cos_sin(machine, cos_sin);
      const std::vector<bf16> x = to_bf16(random_rows(kTokens * 64, kHeadDim, 9));
      DeviceArray<bf16> device_x(machine, x);
      expect_parity(machine, c, false, 0, [&](const QuantizedRows& out, const auto& context) {
        constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
        inverse_rope_quantize(
            InverseRopeQuantizeArgs{kGpu ? device_x.data() : x.data(), kGpu ? device_cos_sin.data() : cos_sin.data(),
                                    kGpu ? device_positions.data() : positions.data(), kTokens, 64, kHeadDim, rope_dim,
                                    8, out},
            context);
      });
    }
}

TEST(GpuQuantize, ZeroRowsAreLegalAndBadShapesAreRefused) {
  DSV4_NEEDS_GPU();
  Machine machine;
  DeviceArray<uint8_t> bytes(machine, 4096);
  QuantizedRows out{.codes = bytes.data(), .sf = bytes.data()};
  EXPECT_NO_THROW(quantize_rows(QuantizeArgs{bytes.data(), false, nullptr, 0, 0, 64, 64, out}, machine.gpu));
  EXPECT_THROW(quantize_rows(QuantizeArgs{bytes.data(), false, nullptr, 0, 1, 24, 24, out}, machine.gpu), Error);
  EXPECT_THROW(quantize_rows(QuantizeArgs{bytes.data() + 2, false, nullptr, 0, 1, 64, 64, out}, machine.gpu), Error);
  EXPECT_THROW(
      quantize_rows(QuantizeArgs{bytes.data(), false, reinterpret_cast<bf16*>(bytes.data()), 0, 1, 32768, 32768, out},
                    machine.gpu),
      Error);
  out.sf = nullptr;
  EXPECT_THROW(quantize_rows(QuantizeArgs{bytes.data(), false, nullptr, 0, 1, 64, 64, out}, machine.gpu), Error);
}

TEST(GpuSwigluQuantize, EqualsReferenceForEveryFormat) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const Case& c : kCases)
    expect_swiglu_parity(machine, c, to_bf16(random_rows(c.rows, c.cols, 6)), to_bf16(random_rows(c.rows, c.cols, 7)),
                         c.cols, true);
}

// Every bf16 gate beside many ups, with a limit that is a bf16 number and one that is not.
TEST(GpuSwigluQuantize, LongCallsEqualReferenceForEveryLimit) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const float limit : {10.0f, 7.3f})
    for (const RowFormat format : {RowFormat::kNvfp4, RowFormat::kBf16}) {
      const Case c{131 * 16 + 3, 4096, format, format == RowFormat::kNvfp4 ? GlobalMode::kPerRow : GlobalMode::kOne};
      std::vector<bf16> gate(static_cast<size_t>(c.rows * c.cols)), up = to_bf16(random_rows(c.rows, c.cols, 13));
      for (size_t i = 0; i < gate.size(); ++i)
        gate[i] = bf16{static_cast<uint16_t>((i & 0x7fff) >= 0x7f80 ? 0x8000 : i)};
      DeviceArray<bf16> device_gate(machine, gate), device_up(machine, up);
      expect_parity(machine, c, false, 0, [&](const QuantizedRows& out, const auto& context) {
        constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
        swiglu_quantize(SwigluQuantizeArgs{kGpu ? device_gate.data() : gate.data(), kGpu ? device_up.data() : up.data(),
                                           nullptr, limit, c.rows, c.cols, c.cols, out},
                        context);
      });
    }
}

// silu has 65536 bf16 inputs. One element a row and u = 2688: the row's global is |silu(g)| in binary32, the code its sign.
TEST(GpuSwigluQuantize, EveryBf16GateGivesTheReferencesBits) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const float sign : {1.0f, -1.0f}) {
    const Case c{32768, 16, RowFormat::kNvfp4, GlobalMode::kComputeRow};
    std::vector<bf16> gate(static_cast<size_t>(c.rows * c.cols), bf16{0}), up(gate.size(), encode_bf16(1.0f));
    for (uint32_t bits = 0; bits < 32768; ++bits)
      gate[bits * 16 + bits % 16] = encode_bf16(sign * decode_bf16(bf16{static_cast<uint16_t>(bits)}));
    DeviceArray<bf16> device_gate(machine, gate), device_up(machine, up);
    const std::vector<float> rho(static_cast<size_t>(c.rows), 2688.0f);
    DeviceArray<float> device_rho(machine, rho);
    expect_parity(machine, c, false, 0, [&](const QuantizedRows& out, const auto& context) {
      constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
      swiglu_quantize(SwigluQuantizeArgs{kGpu ? device_gate.data() : gate.data(), kGpu ? device_up.data() : up.data(),
                                         kGpu ? device_rho.data() : rho.data(), 80.0f, c.rows, c.cols, c.cols, out},
                      context);
    });
  }
}

TEST(GpuInverseRopeQuantize, EqualsReferenceForEveryFormatAndBothModelSizes) {
  DSV4_NEEDS_GPU();
  Machine machine;
  constexpr int kHeadDim = 512, kRopeDim = 64, kPositions = 300;
  std::vector<float> cos_sin;
  for (int p = 0; p < kPositions; ++p)
    for (int i = 0; i < kRopeDim; ++i) {
      const float angle = static_cast<float>(p) * std::pow(160000.0f, -static_cast<float>(2 * (i % 32)) / 64.0f);
      cos_sin.push_back(i < 32 ? std::cos(angle) : std::sin(angle));
    }
  DeviceArray<float> device_cos_sin(machine, cos_sin);
  for (const int heads : {64, 128})
    for (const int64_t tokens : {1, 5, 67})
      for (const RowFormat format : {RowFormat::kNvfp4, RowFormat::kFp8, RowFormat::kBf16})
        for (const GlobalMode global : {GlobalMode::kOne, GlobalMode::kComputeRow})
          for (const SfLayout layout : {SfLayout::kLinear, SfLayout::k128x4}) {
            if (format != RowFormat::kNvfp4 && (global != GlobalMode::kOne || layout != SfLayout::kLinear)) continue;
            const Case c{tokens * heads / 8, 8 * kHeadDim, format, global, layout};
            const std::vector<bf16> x = to_bf16(random_rows(tokens * heads, kHeadDim, 9));
            std::vector<int32_t> positions;
            for (int64_t t = 0; t < tokens; ++t) positions.push_back(static_cast<int32_t>((t * 97 + 3) % kPositions));
            DeviceArray<bf16> device_x(machine, x);
            DeviceArray<int32_t> device_positions(machine, positions);
            expect_parity(machine, c, false, tokens, [&](const QuantizedRows& out, const auto& context) {
              constexpr bool kGpu = std::is_same_v<std::decay_t<decltype(context)>, GpuContext>;
              inverse_rope_quantize(InverseRopeQuantizeArgs{kGpu ? device_x.data() : x.data(),
                                                            kGpu ? device_cos_sin.data() : cos_sin.data(),
                                                            kGpu ? device_positions.data() : positions.data(), tokens,
                                                            heads, kHeadDim, kRopeDim, 8, out},
                                    context);
            });
          }
}

// The fused kernels against their unfused twins, all on the device: operation to bf16, then quantize_rows.
TEST(GpuInverseRopeQuantize, FusedIsBitwiseEqualToRotatingThenQuantising) {
  DSV4_NEEDS_GPU();
  Machine machine;
  constexpr int64_t kTokens = 33, kHeads = 64, kRows = kTokens * 8, kCols = 4096;
  std::vector<float> cos_sin;
  for (int p = 0; p < 64; ++p)
    for (int i = 0; i < 64; ++i)
      cos_sin.push_back(i < 32 ? std::cos(0.37f * p * (i + 1)) : std::sin(0.37f * p * (i - 31)));
  std::vector<int32_t> positions(kTokens);
  for (int t = 0; t < kTokens; ++t) positions[t] = t;
  DeviceArray<float> device_cos_sin(machine, cos_sin);
  DeviceArray<int32_t> device_positions(machine, positions);
  DeviceArray<bf16> x(machine, to_bf16(random_rows(kTokens * kHeads, 512, 10))), rotated(machine, kRows * kCols);
  DeviceArray<uint8_t> codes(machine, kRows * kCols / 2), sf(machine, kRows * kCols / 16),
      twin_codes(machine, kRows * kCols / 2), twin_sf(machine, kRows * kCols / 16);
  InverseRopeQuantizeArgs args{x.data(), device_cos_sin.data(), device_positions.data(), kTokens, kHeads, 512, 64, 8,
                               {}};
  args.out = QuantizedRows{.codes = codes.data(), .sf = sf.data()};
  inverse_rope_quantize(args, machine.gpu);
  args.out = QuantizedRows{.format = RowFormat::kBf16, .y = rotated.data()};
  inverse_rope_quantize(args, machine.gpu);
  quantize_rows(QuantizeArgs{rotated.data(), false, nullptr, 0, kRows, kCols, kCols,
                             QuantizedRows{.codes = twin_codes.data(), .sf = twin_sf.data()}},
                machine.gpu);
  expect_same_bytes(codes.host(), twin_codes.host(), "codes");
  expect_same_bytes(sf.host(), twin_sf.host(), "scale factors");
}

}  // namespace
}  // namespace dsv4::test
