// The compiled tables of vec_kernels.inl, one per instruction set.
#pragma once

#include "ops/vec/vec.h"

namespace dsv4 {
namespace vec_avx2 {
extern const VecKernels kTable;
}
namespace vec_avx512 {
extern const VecKernels kTable;
}
}  // namespace dsv4
