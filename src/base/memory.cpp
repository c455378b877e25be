// Reading /proc/meminfo.
#include "base/memory.h"

#include <fstream>
#include <string>

namespace dsv4 {

int64_t available_memory_bytes() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("MemAvailable:")) return std::stoll(line.substr(13)) * 1024;
  return 0;
}

}  // namespace dsv4
