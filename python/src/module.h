// The parts of dsv4._ops that live in files of their own.
#pragma once

#include <nanobind/nanobind.h>

namespace dsv4::py {

// compress_decode and compress_prefill.
void bind_compress(nanobind::module_& module);

}  // namespace dsv4::py
