// Shape printing and aligned host memory.
#include "tensor/tensor.h"

#include <fmt/ranges.h>

#include <cstdlib>

#include "base/check.h"
#include "base/math.h"

namespace dsv4 {

std::string to_string(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

int64_t num_elements(const Shape& shape) {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return count;
}

HostBuffer::HostBuffer(int64_t bytes) : bytes_(bytes) {
  DSV4_CHECK(bytes >= 0, "bytes = {}", bytes);
  void* memory = std::aligned_alloc(64, static_cast<size_t>(round_up(bytes == 0 ? 64 : bytes, 64)));
  if (memory == nullptr) throw_resource("cannot allocate {} bytes of host memory", bytes);
  data_.reset(static_cast<std::byte*>(memory));
}

void HostBuffer::Free::operator()(std::byte* pointer) const { std::free(pointer); }

}  // namespace dsv4
