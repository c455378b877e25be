// The CPU implementations of moe, one per instruction set. Arguments have been checked by moe().
#pragma once

#include "ops/moe/moe.h"

namespace dsv4 {

// Plain loops in the contract's order: double sums (exact, a16), exact integer groups (a4).
void moe_reference(const MoeArgs& args, const CpuContext& context);

// Panel kernels of context.isa.
void moe_simd(const MoeArgs& args, const CpuContext& context);

}  // namespace dsv4
