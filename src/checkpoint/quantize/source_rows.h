// Rows of a stored matrix as binary32, whatever the format, and giving mapped pages back after use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "checkpoint/checkpoint.h"

namespace dsv4 {

// Decodes row `row`. out: [matrix.cols]
// kF32, kBf16, kFp8Block (q * scale of its 128x128 block), kMxfp4.
void decode_row(const StoredMatrix& matrix, int64_t row, float* out);

// False if there is an infinity or a NaN.
bool all_finite(const float* x, int64_t count);

// Gives pages of read-only file maps back after use, so that resident memory stays bounded however large the files are.
// Reading them again works and comes from the page cache. Touches nothing outside the maps it was made with.
class MappedPages {
 public:
  explicit MappedPages(const Checkpoint& checkpoint);
  // Whole pages inside [data, data + bytes).
  void release(const void* data, uint64_t bytes) const;
  // The part of a matrix's weight that rows [first, last) occupy.
  void release_rows(const StoredMatrix& matrix, int64_t first, int64_t last) const;

 private:
  std::vector<std::span<const std::byte>> maps_;
};

}  // namespace dsv4
