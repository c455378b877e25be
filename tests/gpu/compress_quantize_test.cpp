// compress_quantize against compressor.h, prefill against decode, and its cache formats against the CPU's row codec.
#include "gpu/gpu_test.h"
#include "ops/compress_case.h"
#include "ops/compressor/compressor_gpu.h"

namespace dsv4::test {
namespace {

// A Sequence's arrays, and Indices', on the device.
struct DeviceSequence {
  DeviceArray<float> value, gate, ape, table;
  DeviceArray<bf16> norm;
  DeviceSequence(Machine& m, const Sequence& s)
      : value(m, s.value), gate(m, s.gate), ape(m, s.ape), table(m, s.table), norm(m, s.norm) {}
};
struct DeviceIndices {
  DeviceArray<int32_t> positions, states, token_windows, windows;
  DeviceIndices(Machine& m, const Indices& i)
      : positions(m, i.positions), states(m, i.states), token_windows(m, i.token_windows), windows(m, i.windows) {}
};
struct DeviceStates {
  DeviceArray<float> value, gate;
  DeviceStates(Machine& m, const Sequence& s, int num_states)
      : value(m, int64_t{num_states} * s.traits.state_rows * s.traits.width), gate(m, value.bytes() / 4) {
    reset_compressor_states(s.kind, value.data(), gate.data(), num_states, m.gpu);
    m.stream.synchronize();  // what follows may read it before the reset is done (compressor_gpu.h)
  }
};

// The pages that chunks of the given sizes leave.
struct Result {
  PageLayout layout;
  DevicePages pages;
  std::vector<uint8_t> image;

  Result(Machine& machine, const Sequence& s, const Formats& formats, const std::vector<int64_t>& chunks,
         int rows_per_page = 2)
      : layout(formats.layout(s.kind)), pages(make_pages(layout, rows_per_page, s.num_windows())) {
    constexpr int kStates = 3, kState = 1;  // the sequence sits in the middle one
    DeviceArray<uint8_t> memory(machine, std::vector<uint8_t>(static_cast<size_t>(image_bytes(pages)), 0xa5));
    const DeviceSequence arrays(machine, s);
    const DeviceStates states(machine, s, kStates);
    pages.base = memory.data();
    run_chunks(s, compress_common(s.kind, arrays, states.value.data(), states.gate.data(), pages, formats), kState,
               DeviceIndices(machine, Indices(s, kState)), chunks, machine.gpu);
    image = memory.host();
    pages.base = image.data();
  }
  Result(const Result&) = delete;
  std::vector<uint8_t> row(int64_t w) const { return row_bytes(pages, layout, w); }
  std::vector<float> bf16_row(int64_t w) const { return test::bf16_row(pages, layout, w); }
};

TEST(GpuCompressQuantize, RowsEqualTheCpuCompressorUpToOneBf16StepOfTheNorm) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const CompressorKind kind : kCompressorKinds) {
    SCOPED_TRACE(static_cast<int>(kind));
    const Sequence s(kind, test_tokens(kind));
    const Result got(machine, s, {}, {0});
    const std::vector<float> want = s.rows(machine.cpu);
    int64_t different = 0;
    for (int64_t w = 0; w < s.num_windows(); ++w)
      different +=
          expect_close_row(got.bf16_row(w), {&want[w * s.traits.dim], &want[w * s.traits.dim] + s.traits.dim}, w);
    EXPECT_LT(static_cast<double>(different) / static_cast<double>(want.size()), 0.01);
  }
}

TEST(GpuCompressQuantize, DecodeAndAnyChunkingGiveThePrefillsBytes) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const CompressorKind kind : kCompressorKinds) {
    const Sequence s(kind, test_tokens(kind));
    const Formats formats{KvFormat::kNvfp4, IndexFormat::kFp4};
    const Result whole(machine, s, formats, {0});
    for (const std::vector<int64_t>& chunks :
         {std::vector<int64_t>{1}, {3, 0}, {4, 1, 1, 2, 0}, {130, 1, 1, 5, 0}, {2, 7, 1, 9, 3, 1, 0}}) {
      SCOPED_TRACE(std::to_string(static_cast<int>(kind)) + " first chunk " + std::to_string(chunks[0]));
      expect_same_bytes(Result(machine, s, formats, chunks).image, whole.image, "pages");
    }
  }
}

// Short calls read the state and the indices before the predecessor is done (compressor_gpu.h), long ones of csa and the indexer (here: of a
// machine without multiprocessors) after. Two sequences take turns, so that no call reads what the one before it writes.
TEST(GpuCompressQuantize, DependentDecodeOfAlternatingSequencesGivesThePrefillsBytes) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const CompressorKind kind : kCompressorKinds)
    for (const bool early : {true, false}) {
      SCOPED_TRACE(std::to_string(static_cast<int>(kind)) + (early ? " early" : " late"));
      const Sequence s(kind, test_tokens(kind));
      const Formats formats{KvFormat::kNvfp4, IndexFormat::kFp4};
      const Result want(machine, s, formats, {0});
      const DeviceSequence arrays(machine, s);
      const DeviceStates states(machine, s, 2);
      const DeviceIndices first(machine, Indices(s, 0)), second(machine, Indices(s, 1));
      const DeviceArray<uint8_t> first_image(machine, std::vector<uint8_t>(want.image.size(), 0xa5)),
          second_image(machine, std::vector<uint8_t>(want.image.size(), 0xa5));
      GpuContext context = machine.gpu;
      context.dependent = true;
      if (!early) context.num_sms = 0;
      DevicePages pages = want.pages;
      for (int64_t p = 0; p < s.num_tokens; ++p)
        for (const int sequence : {0, 1}) {
          pages.base = (sequence == 0 ? first_image : second_image).data();
          const DeviceIndices& indices = sequence == 0 ? first : second;
          const CompressCommon common =
              compress_common(kind, arrays, states.value.data(), states.gate.data(), pages, formats);
          compress_quantize(CompressDecodeArgs{from_token(common, s.traits, p), indices.positions.data() + p,
                                               indices.states.data() + p, indices.token_windows.data() + p,
                                               indices.token_windows.data() + p, 1},
                            context);
        }
      expect_same_bytes(first_image.host(), want.image, "first sequence");
      expect_same_bytes(second_image.host(), want.image, "second sequence");
    }
}

// Sequences in all phases in one call, against one call for each: HCA's clusters take several of them, some of which complete a window.
void expect_bytes_of_one_at_a_time(int num_tokens) {
  Machine machine;
  for (const CompressorKind kind : kCompressorKinds) {
    const Sequence s(kind, std::max(num_tokens, 2 * 128));  // angles of two windows
    const int ratio = s.traits.ratio;
    const Formats formats{KvFormat::kNvfp4, IndexFormat::kFp4};
    const PageLayout layout = formats.layout(kind);
    const DeviceSequence arrays(machine, s);
    std::vector<int32_t> positions, own;
    for (int i = 0; i < num_tokens; ++i) {
      positions.push_back(i % 3 == 0 ? 3 * ratio - 1 : ratio + i * 37 % 128);
      own.push_back((i * 7 + 3) % num_tokens);
    }
    const DeviceArray<int32_t> device_positions(machine, positions), device_own(machine, own),
        rope_rows(machine, std::vector<int32_t>(static_cast<size_t>(num_tokens), 1));
    const std::vector<float> values = random_floats(int64_t{num_tokens} * s.traits.state_rows * s.traits.width, 9);
    DevicePages pages = make_pages(layout, 2, num_tokens);
    struct After {
      std::vector<uint8_t> image;
      std::vector<float> value, gate;
    };
    const auto run = [&](int tokens_per_call, int num_sms, bool dependent) {
      const DeviceArray<float> state_value(machine, values), state_gate(machine, values);
      const DeviceArray<uint8_t> image(machine, std::vector<uint8_t>(static_cast<size_t>(image_bytes(pages)), 0xa5));
      GpuContext context = machine.gpu;
      context.dependent = dependent;
      if (num_sms >= 0) context.num_sms = num_sms;
      pages.base = image.data();
      const CompressCommon common =
          compress_common(kind, arrays, state_value.data(), state_gate.data(), pages, formats);
      for (int first = 0; first < num_tokens; first += tokens_per_call)
        compress_quantize(CompressDecodeArgs{from_token(common, s.traits, first), device_positions.data() + first,
                                             device_own.data() + first, rope_rows.data() + first,
                                             device_own.data() + first, tokens_per_call},
                          context);
      return After{image.host(), state_value.host(), state_gate.host()};
    };
    const After want = run(1, -1, false);
    for (const int num_sms : {-1, 17, 0})
      for (const bool dependent : {false, true}) {
        SCOPED_TRACE(std::to_string(static_cast<int>(kind)) + ", " + std::to_string(num_sms) + " multiprocessors" +
                     (dependent ? ", dependent" : ""));
        const After got = run(num_tokens, num_sms, dependent);
        expect_same_bytes(got.image, want.image, "pages");
        expect_same_bytes(got.value, want.value, "states' values");
        expect_same_bytes(got.gate, want.gate, "states' gates");
      }
  }
}

TEST(GpuCompressQuantize, DecodeOfFortySequencesGivesTheBytesOfOneAtATime) {
  DSV4_NEEDS_GPU();
  expect_bytes_of_one_at_a_time(40);
}

TEST(GpuCompressQuantize, DecodeOfManySequencesGivesTheBytesOfOneAtATime) {
  DSV4_NEEDS_GPU();
  expect_bytes_of_one_at_a_time(600);
}

TEST(GpuCompressQuantize, CacheRowsEqualTheCpuCodecOfTheFinishedRow) {
  DSV4_NEEDS_GPU();
  Machine machine;
  for (const CompressorKind kind : {CompressorKind::kCsa, CompressorKind::kHca}) {
    const Sequence s(kind, test_tokens(kind));
    const Result rows(machine, s, {}, {0});
    for (const KvFormat format : {KvFormat::kFp8, KvFormat::kNvfp4})
      for (const int rows_per_page : {2, 64}) {
        const Formats formats{format, IndexFormat::kBf16};
        const Result got(machine, s, formats, {0}, rows_per_page);
        for (int64_t w = 0; w < s.num_windows(); ++w)
          expect_same_bytes(got.row(w), codec_row(kind, formats, rows.bf16_row(w)), "row");
      }
  }
}

TEST(GpuCompressQuantize, IndexKeysEqualTheCpuHadamardAndCodecOfTheFinishedRow) {
  DSV4_NEEDS_GPU();
  Machine machine;
  const Sequence s(CompressorKind::kIndexer, test_tokens(CompressorKind::kIndexer));
  const Result rows(machine, s, {}, {0});
  for (const IndexFormat format : {IndexFormat::kFp8, IndexFormat::kFp4}) {
    const Formats formats{KvFormat::kBf16, format};
    const Result got(machine, s, formats, {0}, 64);
    for (int64_t w = 0; w < s.num_windows(); ++w)
      expect_same_bytes(got.row(w), codec_row(s.kind, formats, rows.bf16_row(w)), "key");
  }
}

}  // namespace
}  // namespace dsv4::test
