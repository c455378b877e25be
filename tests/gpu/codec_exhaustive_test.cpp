// Every binary32 bit pattern through the device encoders, against the host codec.
#include "gpu/codec_exhaustive.h"

#include <atomic>

#include "codec/e2m1.h"
#include "codec/e4m3.h"
#include "gpu/gpu_test.h"

namespace dsv4::test {
namespace {

constexpr int64_t kChunk = int64_t{1} << 28;

template <class Run, class Host>
void expect_all_patterns_equal(const Run& run, const Host& host_encode, const char* what) {
  Machine machine;
  gpu::DeviceBuffer device(kChunk);
  gpu::PinnedBuffer host(kChunk);
  for (uint64_t first = 0; first < (uint64_t{1} << 32); first += kChunk) {
    run(static_cast<uint32_t>(first), kChunk, device.as<uint8_t>(), machine.gpu.stream);
    gpu::copy_to_host(host.data(), device.data(), kChunk, machine.gpu.stream);
    machine.stream.synchronize();
    std::atomic<int64_t> different{0};
    std::atomic<uint64_t> example{0};
    const uint8_t* codes = host.as<uint8_t>();
    constexpr int64_t kPiece = 1 << 20;
    machine.pool.parallel_for(kChunk / kPiece, [&](int64_t piece) {
      int64_t count = 0;
      for (int64_t i = piece * kPiece; i < (piece + 1) * kPiece; ++i) {
        const auto bits = static_cast<uint32_t>(first + static_cast<uint64_t>(i));
        if (codes[i] != host_encode(__builtin_bit_cast(float, bits))) {
          ++count;
          example = bits;
        }
      }
      different += count;
    });
    ASSERT_EQ(different.load(), 0) << what << ": differs at bits 0x" << std::hex << example.load();
  }
}

TEST(CodecExhaustive, DeviceE2m1EncoderEqualsHostCodecOnAllBinary32) {
  DSV4_NEEDS_GPU();
  expect_all_patterns_equal(
      encode_e2m1_run, [](float x) { return encode_e2m1(x); }, "e2m1 encoders");
}

TEST(CodecExhaustive, DeviceCodecE2m1EqualsHostCodecOnAllBinary32) {
  DSV4_NEEDS_GPU();
  expect_all_patterns_equal(
      encode_e2m1_codec_run, [](float x) { return encode_e2m1(x); }, "encode_e2m1 on the device");
}

TEST(CodecExhaustive, DeviceE4m3EncoderEqualsHostCodecOnAllBinary32) {
  DSV4_NEEDS_GPU();
  expect_all_patterns_equal(
      encode_e4m3_run, [](float x) { return encode_e4m3(x); }, "encode_e4m3x8");
}

// The whole range that silu (1 .. 2^117) and the group scales (2^-69 .. 2^69) use.
TEST(CodecExhaustive, ShortReciprocalIsRoundedOnEveryBinary32OfItsRange) {
  DSV4_NEEDS_GPU();
  Machine machine;
  DeviceArray<unsigned long long> wrong(machine, std::vector<unsigned long long>{0});
  count_wrong_reciprocals(0x1p-100f, 0x1p117f, wrong.data(), machine.gpu.stream);
  EXPECT_EQ(wrong.host()[0], 0u);
}

}  // namespace
}  // namespace dsv4::test
