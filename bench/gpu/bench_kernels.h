// Kernels the benches themselves need: the copy and read streams that set the ceilings.
#pragma once

#include <cstdint>

#include "gpu/context.h"

namespace dsv4::bench {

void launch_copy(void* to, const void* from, int64_t bytes, const GpuContext& context);  // bytes: multiple of 16
void launch_read(const void* from, int64_t bytes, uint32_t* sink, const GpuContext& context);

}  // namespace dsv4::bench
