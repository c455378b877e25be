// The JSON files that tell engines what is quantised how: config.json, hf_quant_config.json, the shard index (spec 7.4).
#pragma once

#include <string>

#include "checkpoint/quantize/plan.h"

namespace dsv4 {

// source_text: config.json of the source, whose other keys and their order are kept.
std::string make_config_json(const std::string& source_text, const QuantizePlan& plan, const QuantizeOptions& options);
std::string make_hf_quant_config_json(const QuantizePlan& plan, const QuantizeOptions& options);
// model.safetensors.index.json; only for more than one shard.
std::string make_index_json(const QuantizePlan& plan);

}  // namespace dsv4
