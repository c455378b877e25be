// The two CPU implementations behind attention().
#pragma once

#include "ops/attention/attention.h"

namespace dsv4 {
void attention_reference(const AttentionArgs& args, const CpuContext& context);
void attention_simd(const AttentionArgs& args, const CpuContext& context);
}  // namespace dsv4
