// The implementations of gemm, one per instruction set. Arguments have been checked by gemm().
#pragma once

#include "ops/gemm/gemm.h"

namespace dsv4 {

// Plain loops with double sums: what every other implementation is compared with.
void gemm_reference(const GemmArgs& args, const CpuContext& context);

// Panel kernels of context.isa.
void gemm_simd(const GemmArgs& args, const CpuContext& context);

}  // namespace dsv4
