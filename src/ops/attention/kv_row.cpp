// Encoding and decoding of cache rows and index keys.
#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/math.h"
#include "codec/fp8_block.h"
#include "codec/nvfp4.h"
#include "ops/attention/kv_view.h"
#include "ops/vec/vec.h"

namespace dsv4 {
namespace {

// Decoding tables: one look-up per element instead of bit arithmetic.
struct DecodeTables {
  float e4m3[256];
  float e2m1_pair[256][2];  // low nibble first
  DecodeTables() {
    for (int code = 0; code < 256; ++code) {
      e4m3[code] = decode_e4m3(static_cast<uint8_t>(code));
      e2m1_pair[code][0] = decode_e2m1(e2m1x2_even(static_cast<uint8_t>(code)));
      e2m1_pair[code][1] = decode_e2m1(e2m1x2_odd(static_cast<uint8_t>(code)));
    }
  }
};
const DecodeTables& tables() {
  static const DecodeTables instance;
  return instance;
}

// The bytes are the same on every instruction set: take the fastest.
void encode_bf16_array(const float* x, int n, uint8_t* out) {
  vec_kernels(best_cpu_isa()).encode_bf16(x, n, reinterpret_cast<uint16_t*>(out));
}

void decode_bf16_array(const uint8_t* in, int n, float* y, CpuIsa isa) {
  vec_kernels(isa).decode_bf16(reinterpret_cast<const uint16_t*>(in), n, y);
}

// e4m3 values with one ue8m0 scale per block.
void encode_fp8_blocks(const float* x, int n, int block, uint8_t* codes, uint8_t* scales) {
  for (int start = 0; start < n; start += block) {
    const int count = std::min(block, n - start);
    const uint8_t scale = fp8_block_scale(group_amax(x + start, count));
    scales[start / block] = scale;
    for (int i = start; i < start + count; ++i) codes[i] = encode_fp8_block_element(x[i], scale);
  }
}

void decode_fp8_blocks(const uint8_t* codes, const uint8_t* scales, int n, int block, float* y) {
  const float* e4m3 = tables().e4m3;
  for (int start = 0; start < n; start += block) {
    const float scale = decode_ue8m0(scales[start / block]);
    const int end = std::min(start + block, n);
    for (int i = start; i < end; ++i) y[i] = e4m3[codes[i]] * scale;
  }
}

void decode_e2m1_group(const uint8_t* codes, int n, float scale, float* y) {
  const auto& pair = tables().e2m1_pair;
  for (int j = 0; j < n / 2; ++j) {
    y[2 * j] = pair[codes[j]][0] * scale;
    y[2 * j + 1] = pair[codes[j]][1] * scale;
  }
}

constexpr int kScalePadding = 8;  // bytes: 7 -> 8 (fp8) and 28 -> 32 (nvfp4) at head_dim 512

// Byte offsets inside a row.
struct RowOffsets {
  int64_t rope;
  int64_t scales;
  int64_t end;
};
RowOffsets row_offsets(const KvRowLayout& layout) {
  const int64_t nope = layout.nope_dim(), rope_bytes = 2 * layout.rope_dim;
  switch (layout.format) {
    case KvFormat::kF32:
      return {4 * nope, 0, 4 * layout.head_dim};
    case KvFormat::kBf16:
      return {2 * nope, 0, 2 * layout.head_dim};
    case KvFormat::kFp8:
      return {nope, nope + rope_bytes, nope + rope_bytes + round_up(ceil_div(nope, kFp8KvBlock), kScalePadding)};
    case KvFormat::kNvfp4:
      return {nope / 2, nope / 2 + rope_bytes, nope / 2 + rope_bytes + round_up(nope / kNvfp4GroupSize, kScalePadding)};
  }
  return {};
}

}  // namespace

int64_t KvRowLayout::row_bytes() const { return row_offsets(*this).end; }

void encode_kv_row(const KvRowLayout& layout, const float* x, uint8_t* row) {
  const int nope = layout.nope_dim();
  const RowOffsets at = row_offsets(layout);
  switch (layout.format) {
    case KvFormat::kF32:
      std::memcpy(row, x, static_cast<size_t>(at.end));
      return;
    case KvFormat::kBf16:
      encode_bf16_array(x, layout.head_dim, row);
      return;
    case KvFormat::kFp8:
      std::memset(row + at.scales, 0, static_cast<size_t>(at.end - at.scales));
      encode_fp8_blocks(x, nope, kFp8KvBlock, row, row + at.scales);
      break;
    case KvFormat::kNvfp4: {
      std::memset(row + at.scales, 0, static_cast<size_t>(at.end - at.scales));
      constexpr GlobalScale kNoGlobal{1.0f};
      for (int g = 0; g < nope / kNvfp4GroupSize; ++g) {
        const Nvfp4Group group = encode_nvfp4_runtime_group(x + g * kNvfp4GroupSize, kNoGlobal, nvfp4_rcp6(kNoGlobal));
        std::memcpy(row + g * sizeof(group.codes), group.codes, sizeof(group.codes));
        row[at.scales + g] = group.sf;
      }
      break;
    }
  }
  encode_bf16_array(x + nope, layout.rope_dim, row + at.rope);
}

void decode_kv_row(const KvRowLayout& layout, const uint8_t* row, float* y, CpuIsa isa) {
  const int nope = layout.nope_dim();
  const RowOffsets at = row_offsets(layout);
  switch (layout.format) {
    case KvFormat::kF32:
      std::memcpy(y, row, static_cast<size_t>(at.end));
      return;
    case KvFormat::kBf16:
      decode_bf16_array(row, layout.head_dim, y, isa);
      return;
    case KvFormat::kFp8:
      decode_fp8_blocks(row, row + at.scales, nope, kFp8KvBlock, y);
      break;
    case KvFormat::kNvfp4:
      for (int g = 0; g < nope / kNvfp4GroupSize; ++g)
        decode_e2m1_group(row + g * kNvfp4GroupSize / 2, kNvfp4GroupSize, decode_ue4m3(row[at.scales + g]),
                          y + g * kNvfp4GroupSize);
      break;
  }
  decode_bf16_array(row + at.rope, layout.rope_dim, y + nope, isa);
}

int64_t IndexKeyLayout::row_bytes() const {
  switch (format) {
    case IndexFormat::kF32:
      return 4 * dim;
    case IndexFormat::kBf16:
      return 2 * dim;
    case IndexFormat::kFp8:
      return dim + 4;
    case IndexFormat::kFp4:
      return dim / 2 + ceil_div(dim, kFp4IndexBlock);
  }
  return 0;
}

void encode_index_key(const IndexKeyLayout& layout, const float* x, uint8_t* row) {
  const int dim = layout.dim;
  switch (layout.format) {
    case IndexFormat::kF32:
      std::memcpy(row, x, sizeof(float) * static_cast<size_t>(dim));
      return;
    case IndexFormat::kBf16:
      encode_bf16_array(x, dim, row);
      return;
    case IndexFormat::kFp8: {
      uint8_t scale_byte = 0;
      encode_fp8_blocks(x, dim, dim, row, &scale_byte);
      const float scale = decode_ue8m0(scale_byte);
      std::memcpy(row + dim, &scale, 4);
      return;
    }
    case IndexFormat::kFp4:
      for (int start = 0; start < dim; start += kFp4IndexBlock) {
        const int count = std::min(kFp4IndexBlock, dim - start);
        const uint8_t scale = fp4_block_scale(group_amax(x + start, count));
        row[dim / 2 + start / kFp4IndexBlock] = scale;
        for (int i = start; i < start + count; i += 2)
          row[i / 2] = pack_e2m1x2(encode_fp4_block_element(x[i], scale), encode_fp4_block_element(x[i + 1], scale));
      }
      return;
  }
}

void decode_index_key(const IndexKeyLayout& layout, const uint8_t* row, float* y, CpuIsa isa) {
  const int dim = layout.dim;
  switch (layout.format) {
    case IndexFormat::kF32:
      std::memcpy(y, row, sizeof(float) * static_cast<size_t>(dim));
      return;
    case IndexFormat::kBf16:
      decode_bf16_array(row, dim, y, isa);
      return;
    case IndexFormat::kFp8: {
      float scale = 0;
      std::memcpy(&scale, row + dim, 4);
      for (int i = 0; i < dim; ++i) y[i] = tables().e4m3[row[i]] * scale;
      return;
    }
    case IndexFormat::kFp4:
      for (int start = 0; start < dim; start += kFp4IndexBlock)
        decode_e2m1_group(row + start / 2, std::min(kFp4IndexBlock, dim - start),
                          decode_ue8m0(row[dim / 2 + start / kFp4IndexBlock]), y + start);
      return;
  }
}

}  // namespace dsv4
