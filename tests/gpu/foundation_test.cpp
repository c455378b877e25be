// src/gpu on a card: tensor maps and bulk copies, multicast, graphs, events, dependent launches, and what errors say.
#include "foundation_kernels.h"
#include "gpu/error.h"
#include "gpu/l2_sides.h"
#include "gpu/tma.h"
#include "gpu_test.h"

namespace dsv4 {
namespace {

using test::DeviceArray;
using test::kBoxBytes;
using test::kBoxCols;
using test::kBoxRows;
using test::Machine;

std::vector<uint16_t> counted(int64_t rows, int64_t pitch) {
  std::vector<uint16_t> values(static_cast<size_t>(rows * pitch));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i * 7 + 1);
  return values;
}

TEST(GpuFoundation, DevicesDescribeThemselves) {
  DSV4_NEEDS_GPU();
  const gpu::Device device = gpu::current_device();
  EXPECT_FALSE(device.name.empty());
  EXPECT_GE(device.major, 9);
  EXPECT_GT(device.num_sms, 0);
  EXPECT_GT(device.memory_bytes, int64_t{1} << 30);
  EXPECT_GT(device.l2_bytes, 0);
  EXPECT_GE(device.max_smem_bytes, 96 * 1024);
}

// Measured twice: the same. Of an aligned pair of chunks each side has one, and measuring changes nothing in memory.
TEST(GpuFoundation, SidesOfTheL2) {
  DSV4_NEEDS_GPU();
  Machine machine;
  const gpu::SmSides sms = gpu::find_sm_sides(machine.stream.get()), again = gpu::find_sm_sides(machine.stream.get());
  if (!sms.known || !again.known) GTEST_SKIP() << "this GPU's L2 has no two sides, or other work hid them";
  EXPECT_EQ(std::vector(std::begin(sms.bits), std::end(sms.bits)),
            std::vector(std::begin(again.bits), std::end(again.bits)));
  constexpr int64_t kChunks = 2048;
  gpu::AlignedBuffer memory(kChunks * gpu::kL2ChunkBytes, 2 * gpu::kL2ChunkBytes);
  std::vector<uint32_t> words(static_cast<size_t>(memory.bytes() / 4)), after(words.size());
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(i * 2654435761u);
  gpu::copy_to_device(memory.as<void>(), words.data(), memory.bytes(), machine.stream.get());
  const auto find = [&] { return gpu::find_chunk_sides(sms, memory.as<void>(), kChunks, machine.stream.get()); };
  const std::vector<uint8_t> sides = find(), sides_again = find();
  gpu::copy_to_host(after.data(), memory.as<void>(), memory.bytes(), machine.stream.get());
  machine.stream.synchronize();
  EXPECT_EQ(words, after);
  int odd_pairs = 0, changed = 0;
  for (size_t i = 0; i < sides.size(); ++i) {
    changed += sides[i] != sides_again[i];
    if (i % 2 == 0) odd_pairs += sides[i] == sides[i + 1];
  }
  EXPECT_LE(changed, kChunks / 100);  // an interrupted measurement may be wrong
  EXPECT_LE(odd_pairs, kChunks / 100);
  const gpu::SmSides unknown;
  const std::vector<uint8_t> zeros = gpu::find_chunk_sides(unknown, memory.as<void>(), kChunks, machine.stream.get());
  EXPECT_EQ(zeros, std::vector<uint8_t>(kChunks));
}

// A box that hangs over both edges of a matrix whose rows are padded: swizzled in shared memory, zeros outside; the store leaves alone what lies outside.
TEST(GpuFoundation, TensorMapsSwizzleFillWithZerosAndClip) {
  DSV4_NEEDS_GPU();
  Machine machine;
  constexpr int kRows = 100, kCols = 72, kPitch = 80, kCol = 32, kRow = 64;
  const std::vector<uint16_t> source = counted(kRows, kPitch);
  DeviceArray<uint16_t> from(machine, source), to(machine, std::vector<uint16_t>(source.size(), 0xeeee));
  DeviceArray<uint16_t> raw(machine, kBoxBytes / 2);
  const auto map = [&](DeviceArray<uint16_t>& array) {
    return gpu::make_tma_map_2d(gpu::TmaType::kU16, array.data(), kRows, kCols, kPitch * 2, kBoxRows, kBoxCols,
                                gpu::TmaSwizzle::k128B);
  };
  test::copy_box(map(from), map(to), kCol, kRow, reinterpret_cast<uint8_t*>(raw.data()), machine.stream.get());
  const std::vector<uint16_t> box = raw.host(), written = to.host();
  std::vector<uint16_t> want_box(box.size()), want_written(written.size(), 0xeeee);
  for (int r = 0; r < kBoxRows; ++r)
    for (int c = 0; c < kBoxCols; ++c) {
      const bool inside = kRow + r < kRows && kCol + c < kCols;
      const size_t at = static_cast<size_t>((kRow + r) * kPitch + kCol + c);
      want_box[static_cast<size_t>(r * 64 + (((c / 8) ^ (r & 7)) * 8) + c % 8)] = inside ? source[at] : 0;
      if (inside) want_written[at] = source[at];
    }
  test::expect_same_bytes(box, want_box, "box in shared memory");
  test::expect_same_bytes(written, want_written, "matrix stored to");
}

TEST(GpuFoundation, MulticastReachesBothCtas) {
  DSV4_NEEDS_GPU();
  Machine machine;
  const std::vector<uint16_t> source = counted(kBoxRows, kBoxCols);
  DeviceArray<uint16_t> from(machine, source), raw(machine, kBoxBytes);
  const CUtensorMap map = gpu::make_tma_map_2d(gpu::TmaType::kU16, from.data(), kBoxRows, kBoxCols, kBoxCols * 2,
                                               kBoxRows / 2, kBoxCols, gpu::TmaSwizzle::kNone);
  test::multicast_box(map, reinterpret_cast<uint8_t*>(raw.data()), machine.stream.get());
  std::vector<uint16_t> twice = source;
  twice.insert(twice.end(), source.begin(), source.end());
  test::expect_same_bytes(raw.host(), twice, "both CTAs");
}

TEST(GpuFoundation, BulkCopiesMoveBytes) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const int bytes : {16, 2304, 64 * 1024}) {
    std::vector<uint8_t> source(static_cast<size_t>(bytes));
    for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint8_t>(i * 31 + 5);
    DeviceArray<uint8_t> from(machine, source), to(machine, bytes);
    test::bulk_round_trip(from.data(), to.data(), bytes, machine.stream.get());
    test::expect_same_bytes(to.host(), source, "bulk copy");
  }
}

// Three dependent launches in a graph, replayed four times; a capture that throws leaves the stream usable.
TEST(GpuFoundation, GraphsReplayAndSurviveAThrowingCapture) {
  DSV4_NEEDS_GPU();
  Machine machine;
  constexpr int kCount = 100'000;
  DeviceArray<int32_t> values(machine, std::vector<int32_t>(kCount, 5));
  const auto three = [&](cudaStream_t stream) {
    for (int i = 0; i < 3; ++i) test::add_one(values.data(), kCount, 64, /*dependent=*/true, stream);
  };
  const gpu::Graph graph = gpu::Graph::capture(machine.stream, three);
  EXPECT_THROW(gpu::Graph::capture(machine.stream,
                                   [&](cudaStream_t stream) {
                                     three(stream);
                                     throw Error(ErrorKind::kBadInput, "no");
                                   }),
               Error);
  for (int i = 0; i < 4; ++i) graph.launch(machine.stream.get());
  test::expect_same_bytes(values.host(), std::vector<int32_t>(kCount, 17), "after four replays");
}

TEST(GpuFoundation, EventsOrderStreams) {
  DSV4_NEEDS_GPU();
  Machine machine;
  const gpu::Stream other;
  gpu::Event start, first_done;
  constexpr int kCount = 1 << 24;  // the first kernel takes long enough for a missing wait to show
  DeviceArray<int32_t> values(machine, std::vector<int32_t>(kCount, 0));
  start.record(machine.stream.get());
  for (int i = 0; i < 50; ++i) test::add_one(values.data(), kCount, 8, /*dependent=*/false, machine.stream.get());
  first_done.record(machine.stream.get());
  other.wait(first_done);
  test::add_one(values.data(), kCount, 264, /*dependent=*/false, other.get());
  other.synchronize();
  EXPECT_GT(gpu::elapsed_us(start, first_done), 0.0f);
  test::expect_same_bytes(values.host(), std::vector<int32_t>(kCount, 51), "51 increments");
}

TEST(GpuFoundation, ErrorsNameOpShapeAndCudasText) {
  DSV4_NEEDS_GPU();
  Machine machine;
  DeviceArray<uint16_t> array(machine, 64 * 64);
  const auto message = [](const auto& body) -> std::string {
    try {
      body();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  const std::string map = message([&] {
    gpu::make_tma_map_2d(gpu::TmaType::kU16, array.data(), 64, 64, 100 /* not a multiple of 16 */, 32, 64,
                         gpu::TmaSwizzle::kNone);
  });
  EXPECT_NE(map.find("rank-2"), std::string::npos) << map;
  EXPECT_NE(map.find("stride 100"), std::string::npos) << map;
  const std::string launch = message([&] { test::launch_too_many_threads(machine.stream.get()); });
  EXPECT_NE(launch.find("add_one [3 x 4]"), std::string::npos) << launch;
  EXPECT_NE(launch.find("cudaError"), std::string::npos) << launch;
  const std::string memory = message([] { gpu::DeviceBuffer too_much(int64_t{1} << 50); });
  EXPECT_NE(memory.find("out of memory"), std::string::npos) << memory;
  EXPECT_NO_THROW(gpu::check_launch("the next op", "%d", 1)) << "an error that was thrown is not reported twice";
}

}  // namespace
}  // namespace dsv4
