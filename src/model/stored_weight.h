// Stored matrices and small tensors -> what the ops take.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "ops/gemm/weight.h"
#include "tensor/tensor.h"

namespace dsv4 {

// Buffers made while loading; filled from several threads.
class WeightArena {
 public:
  HostBuffer& add(int64_t bytes);
  std::vector<std::unique_ptr<HostBuffer>> take() { return std::move(buffers_); }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<HostBuffer>> buffers_;
};

// Checks the scales (finite, no NaN codes) and builds the view. Official MXFP4 becomes NVFP4: nibbles stay mapped, scales are
// re-expressed without loss; a tensor whose exponents spread over more than 17 binades is refused by name (`dsv4 quantize`
// re-quantises such a tensor and reports what it lost).
Weight make_weight(const StoredMatrix& matrix, WeightArena& arena);

// Rows [begin, begin + count) of w as a weight of their own; FP8 blocks that do not line up are decoded into the arena.
Weight slice_rows(const Weight& w, int64_t begin, int64_t count, WeightArena& arena);

// F32 or BF16 tensor of any shape -> binary32.
std::vector<float> to_floats(const TensorView& view, const std::string& name);

}  // namespace dsv4
