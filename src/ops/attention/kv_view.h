// How cached rows are stored and found. Kernels read through these views; src/cache owns and fills the memory.
//
// One row holds head_dim channels, the last rope_dim of them rotated. Formats (512 channels, 64 rotated):
//   f32   2048 B  binary32                                             --exact
//   bf16  1024 B  bf16
//   fp8    584 B  nope e4m3, then rope bf16, then one ue8m0 per 64 nope channels, padded to 8 (FlashMLA MODEL1 content)
//   nvfp4  384 B  nope e2m1x2, then rope bf16, then one ue4m3 per 16 nope channels, padded to 8; global scale 1
// On the CPU a row is contiguous; the page-wise split of values and scales of the GPU formats is private to that backend.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/cpu_context.h"
#include "ops/precision.h"

namespace dsv4 {

struct KvRowLayout {
  KvFormat format = KvFormat::kBf16;
  int head_dim = 0;
  int rope_dim = 0;

  int nope_dim() const { return head_dim - rope_dim; }
  int64_t row_bytes() const;
};

// x: [head_dim] binary32 -> row bytes. Rounds to the format (run-time rule for nvfp4, the model's quantiser for fp8).
void encode_kv_row(const KvRowLayout& layout, const float* x, uint8_t* row);
// row bytes -> y: [head_dim]
void decode_kv_row(const KvRowLayout& layout, const uint8_t* row, float* y, CpuIsa isa);

// Indexer keys (and queries, which take the same round trip): dim channels.
//   f32 4*dim, bf16 2*dim, fp8 dim + 4 (e4m3, one binary32 power-of-two scale), fp4 dim/2 + dim/32 (e2m1x2, ue8m0 per 32)
struct IndexKeyLayout {
  IndexFormat format = IndexFormat::kBf16;
  int dim = 0;

  int64_t row_bytes() const;
};
void encode_index_key(const IndexKeyLayout& layout, const float* x, uint8_t* row);
void decode_index_key(const IndexKeyLayout& layout, const uint8_t* row, float* y, CpuIsa isa);

// Rows in pages of equal size.
struct PagedRowsView {
  const uint8_t* const* pages = nullptr;  // [ceil(num_rows / rows_per_page)]
  int64_t rows_per_page = 1;
  int64_t row_bytes = 0;
  int64_t num_rows = 0;

  const uint8_t* row(int64_t index) const { return pages[index / rows_per_page] + (index % rows_per_page) * row_bytes; }
};

// The raw rows of recent positions: position p lives in slot p mod capacity.
struct WindowView {
  const uint8_t* rows = nullptr;
  int64_t capacity = 0;
  int64_t row_bytes = 0;

  const uint8_t* row(int64_t position) const { return rows + (position % capacity) * row_bytes; }
};

}  // namespace dsv4
