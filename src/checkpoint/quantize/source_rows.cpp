// Decoding of source rows.
#include "checkpoint/quantize/source_rows.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/check.h"
#include "codec/fp8_block.h"
#include "codec/mxfp4.h"

namespace dsv4 {
namespace {

// Unaligned-safe element reads: a file's tensors need not be aligned.
template <class T>
T load(const std::byte* data, int64_t index) {
  T value;
  std::memcpy(&value, data + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float load_scale(const TensorView& scale, int64_t index) {
  switch (scale.dtype) {
    case DType::kF8E8M0:
      return decode_ue8m0(load<uint8_t>(scale.data, index));
    case DType::kF32:
      return load<float>(scale.data, index);
    case DType::kBf16:
      return decode_bf16({load<uint16_t>(scale.data, index)});
    default:
      break;
  }
  DSV4_CHECK(false, "scale dtype {}", dtype_name(scale.dtype));
}

constexpr std::array<float, 256> make_e4m3_table() {
  std::array<float, 256> table{};
  for (int code = 0; code < 256; ++code) table[static_cast<size_t>(code)] = decode_e4m3(static_cast<uint8_t>(code));
  return table;
}
constexpr std::array<float, 16> make_e2m1_table() {
  std::array<float, 16> table{};
  for (int code = 0; code < 16; ++code) table[static_cast<size_t>(code)] = decode_e2m1(static_cast<uint8_t>(code));
  return table;
}
constexpr auto kE4m3Table = make_e4m3_table();
constexpr auto kE2m1Table = make_e2m1_table();

void decode_fp8_row(const StoredMatrix& matrix, int64_t row, float* out) {
  const auto* codes = matrix.weight.as<uint8_t>() + row * matrix.cols;
  const int64_t blocks = (matrix.cols + kFp8WeightBlock - 1) / kFp8WeightBlock;
  const int64_t scale_row = row / kFp8WeightBlock * blocks;
  for (int64_t block = 0; block < blocks; ++block) {
    const float scale = load_scale(matrix.scale, scale_row + block);
    const int64_t end = std::min(matrix.cols, (block + 1) * kFp8WeightBlock);
    for (int64_t k = block * kFp8WeightBlock; k < end; ++k) out[k] = kE4m3Table[codes[k]] * scale;
  }
}

void decode_mxfp4_row(const StoredMatrix& matrix, int64_t row, float* out) {
  const auto* codes = matrix.weight.as<uint8_t>() + row * (matrix.cols / 2);
  const auto* scales = matrix.scale.as<uint8_t>() + row * (matrix.cols / kMxfp4GroupSize);
  for (int64_t group = 0; group < matrix.cols / kMxfp4GroupSize; ++group) {
    const float scale = decode_ue8m0(scales[group]);
    for (int j = 0; j < kMxfp4GroupSize / 2; ++j) {
      const uint8_t byte = codes[group * (kMxfp4GroupSize / 2) + j];
      out[group * kMxfp4GroupSize + 2 * j] = kE2m1Table[e2m1x2_even(byte)] * scale;
      out[group * kMxfp4GroupSize + 2 * j + 1] = kE2m1Table[e2m1x2_odd(byte)] * scale;
    }
  }
}

}  // namespace

void decode_row(const StoredMatrix& matrix, int64_t row, float* out) {
  const std::byte* weight = matrix.weight.data;
  switch (matrix.format) {
    case StoredFormat::kF32:
      std::memcpy(out, weight + row * matrix.cols * 4, static_cast<size_t>(matrix.cols) * 4);
      return;
    case StoredFormat::kBf16: {
      const std::byte* source = weight + row * matrix.cols * 2;
      for (int64_t k = 0; k < matrix.cols; ++k) out[k] = decode_bf16({load<uint16_t>(source, k)});
      return;
    }
    case StoredFormat::kFp8Block:
      return decode_fp8_row(matrix, row, out);
    case StoredFormat::kMxfp4:
      return decode_mxfp4_row(matrix, row, out);
    case StoredFormat::kNvfp4ModelOpt:
    case StoredFormat::kNvfp4Compressed:
      break;
  }
  DSV4_CHECK(false, "{}: {} is never decoded to be encoded again", matrix.name, stored_format_name(matrix.format));
}

bool all_finite(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t magnitude = static_cast<int32_t>(detail::float_bits(x[k]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7f800000;
}

MappedPages::MappedPages(const Checkpoint& checkpoint) {
  for (const auto& file : checkpoint.files()) maps_.push_back(file->mapped_bytes());
}

void MappedPages::release(const void* data, uint64_t bytes) const {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto first = (begin + page - 1) / page * page;
  const auto last = (begin + bytes) / page * page;
  if (first >= last) return;
  for (const auto& map : maps_) {
    const auto map_begin = reinterpret_cast<uintptr_t>(map.data());
    if (begin < map_begin || begin + bytes > map_begin + map.size()) continue;
    // Only advice: if the kernel declines, the run uses more memory and gives the same result.
    ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    return;
  }
}

void MappedPages::release_rows(const StoredMatrix& matrix, int64_t first, int64_t last) const {
  const int64_t row_bytes = matrix.weight.bytes() / std::max<int64_t>(1, matrix.rows);
  release(matrix.weight.data + first * row_bytes, static_cast<uint64_t>((last - first) * row_bytes));
}

}  // namespace dsv4
