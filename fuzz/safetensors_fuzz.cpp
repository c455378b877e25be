// Arbitrary bytes as a safetensors file: refused with bad input, or every view lies inside the bytes.
#include <cstdlib>

#include "base/check.h"
#include "checkpoint/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    const dsv4::SafetensorsHeader header = dsv4::parse_safetensors(file, "fuzz");
    for (const auto& [name, tensor] : header.tensors) {
      if (tensor.bytes() < 0 || tensor.data < file.data() || tensor.data + tensor.bytes() > file.data() + file.size())
        std::abort();
      // Reads the first and last byte, for the address sanitizer.
      volatile std::byte touched{};
      if (tensor.bytes() > 0) touched = tensor.data[0] ^ tensor.data[tensor.bytes() - 1];
      (void)touched;
    }
  } catch (const dsv4::Error& error) {
    if (error.kind() != dsv4::ErrorKind::kBadInput) std::abort();
  }
  return 0;
}
