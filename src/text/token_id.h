// The integer that stands for a token.
#pragma once

#include <cstdint>

namespace dsv4 {

using TokenId = int32_t;

}  // namespace dsv4
