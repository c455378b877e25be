// What the machine has left.
#pragma once

#include <cstdint>

namespace dsv4 {

// MemAvailable of /proc/meminfo in bytes; 0 if it cannot be read.
int64_t available_memory_bytes();

}  // namespace dsv4
