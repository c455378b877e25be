// The packed form of one NVFP4 weight (layout: gemm_pack.h). Private to gemm/ and moe/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace dsv4 {

struct PackedWeight {
  std::shared_ptr<const std::byte> area;  // keeps the memory alive; shared with the weights packed in the same call
  const std::byte* panels = nullptr;
  int64_t panel_bytes = 0;
};

}  // namespace dsv4
