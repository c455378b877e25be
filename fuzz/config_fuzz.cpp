// Arbitrary text as config.json and generation_config.json: refused with bad input, or a configuration whose tensors can be
// listed with sizes that do not overflow.
#include <cstdlib>

#include "base/check.h"
#include "checkpoint/config.h"
#include "checkpoint/inspect.h"
#include "checkpoint/inventory.h"

namespace {

void list_and_measure(const dsv4::ModelConfig& config) {
  // Larger ones are legal but slow to list one by one.
  if (static_cast<int64_t>(config.num_layers) * config.num_experts > 2048) return;
  for (const dsv4::LogicalTensor& tensor : dsv4::list_tensors(config)) {
    int64_t elements = 1;
    for (int64_t extent : tensor.shape)
      if (extent <= 0 || __builtin_mul_overflow(elements, extent, &elements)) std::abort();
    if (elements > int64_t{1} << 48) std::abort();
  }
  for (const dsv4::KvCost& cost : dsv4::kv_costs(config))
    if (cost.fixed_bytes <= 0 || cost.at[2].bytes < cost.fixed_bytes) std::abort();
  const dsv4::ParameterCount count = dsv4::count_parameters(config);
  if (count.active <= 0 || count.active > count.total) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const dsv4::Json json = dsv4::parse_json(text, "fuzz");
    try {
      dsv4::parse_generation_defaults(json, "fuzz");
    } catch (const dsv4::Error& error) {
      if (error.kind() != dsv4::ErrorKind::kBadInput) std::abort();
    }
    list_and_measure(dsv4::parse_model_config(json, "fuzz"));
  } catch (const dsv4::Error& error) {
    if (error.kind() != dsv4::ErrorKind::kBadInput) std::abort();
  }
  return 0;
}
