// The parts of dsv4._ops that live in files of their own.
#pragma once

#include <nanobind/nanobind.h>

namespace dsv4::py {

// compress_quantize exists on CUDA devices only: the CPU's compressor keeps its state differently (ops/compressor).
void bind_compress(nanobind::module_& module);

}  // namespace dsv4::py
