// The GPU side of quantize.h: same arguments, pointers to device memory, queued on context.stream.
#pragma once

#include "gpu/context.h"
#include "ops/quantize/quantize.h"

namespace dsv4 {

void quantize_rows(const QuantizeArgs& args, const GpuContext& context);
void swiglu_quantize(const SwigluQuantizeArgs& args, const GpuContext& context);
void inverse_rope_quantize(const InverseRopeQuantizeArgs& args, const GpuContext& context);
void dequantize_rows(const DequantizeArgs& args, const GpuContext& context);
void dequantize_fp8_blocks(const DequantizeFp8BlockArgs& args, const GpuContext& context);

}  // namespace dsv4
