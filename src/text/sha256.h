// SHA-256 (FIPS 180-4), to tell a known text of a checkpoint from a changed one.
#pragma once

#include <string>
#include <string_view>

namespace dsv4 {

std::string sha256_hex(std::string_view data);

}  // namespace dsv4
