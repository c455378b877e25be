// dsv4._ops.compress_decode and compress_prefill: ops/compressor/compress_quantize.h on the caller's arrays, updated in place.
#include <fmt/format.h>
#include <nanobind/stl/string.h>

#include <unordered_set>

#include "device.h"
#include "module.h"
#include "ops/compressor/compress_quantize.h"
#ifdef DSV4_PYTHON_CUDA
#include "ops/compressor/compressor_gpu.h"
#endif

namespace dsv4::py {
namespace {

CompressorKind parse_kind(const std::string& kind) {
  if (kind == "csa") return CompressorKind::kCsa;
  if (kind == "hca") return CompressorKind::kHca;
  if (kind == "indexer") return CompressorKind::kIndexer;
  throw_value_error("kind", "'csa', 'hca' or 'indexer'", "'" + kind + "'");
}

// Arguments of both forms. State is [num_states, state_rows, width], or [state_rows, width] for the one sequence of a prefill.
struct CommonArrays {
  CompressorKind kind;
  CompressorTraits traits;
  Array value, gate, ape, norm_weight, cos_sin, state_value, state_gate, pages;

  CommonArrays(const std::string& kind_name, nb::handle value_object, nb::handle gate_object, nb::handle ape_object,
               nb::handle norm_object, nb::handle cos_sin_object, nb::handle state_value_object,
               nb::handle state_gate_object, nb::handle pages_object)
      : kind(parse_kind(kind_name)),
        traits(compressor_traits(kind)),
        value("value", value_object, Access::kRead),
        gate("gate", gate_object, Access::kRead),
        ape("ape", ape_object, Access::kRead),
        norm_weight("norm_weight", norm_object, Access::kRead),
        cos_sin("cos_sin", cos_sin_object, Access::kRead),
        state_value("state_value", state_value_object, Access::kWrite),
        state_gate("state_gate", state_gate_object, Access::kWrite),
        pages("pages", pages_object, Access::kWrite) {}

  int64_t num_tokens() const { return value.size(0); }

  CompressCommon checked(bool one_sequence, const std::string& row_format, int64_t rows_per_page, float rms_eps) const {
    check_device(value);
    const auto dense = [&](const Array& array) -> const Array& {
      return array.of(Type::kFloat32).contiguous().on(value).aligned();
    };
    dense(value.with_ndim(2)).shaped({num_tokens(), traits.width});
    dense(gate).shaped({num_tokens(), traits.width});
    dense(ape).shaped({traits.ratio, traits.width});
    norm_weight.of(Type::kBf16).shaped({traits.dim}).contiguous().on(value).aligned();
    dense(cos_sin.with_ndim(2)).shaped({cos_sin.size(0), kKvRopeDim});
    state_value.with_ndim(one_sequence ? 2 : 3);
    std::vector<int64_t> state_shape{traits.state_rows, traits.width};
    if (!one_sequence) state_shape.insert(state_shape.begin(), state_value.size(0));
    dense(state_value).shaped(state_shape);
    dense(state_gate).shaped(state_shape);
    CompressCommon common{kind,
                          value.data<const float>(),
                          gate.data<const float>(),
                          ape.data<const float>(),
                          norm_weight.data<const bf16>(),
                          cos_sin.data<const float>(),
                          state_value.data<float>(),
                          state_gate.data<float>(),
                          rms_eps,
                          {},
                          KvFormat::kBf16,
                          IndexFormat::kBf16};
    const PageLayout layout = parse_format(row_format, common);
    common.pages = checked_pages(layout, rows_per_page);
    return common;
  }

 private:
  PageLayout parse_format(const std::string& format, CompressCommon& common) const {
    if (kind == CompressorKind::kIndexer) {
      if (format != "bf16" && format != "fp8" && format != "fp4")
        throw_value_error("row_format", "'bf16', 'fp8' or 'fp4' for kind 'indexer'", "'" + format + "'");
      common.index_format = format == "bf16"  ? IndexFormat::kBf16
                            : format == "fp8" ? IndexFormat::kFp8
                                              : IndexFormat::kFp4;
      return index_page_layout(common.index_format);
    }
    if (format != "bf16" && format != "fp8" && format != "nvfp4")
      throw_value_error("row_format", "'bf16', 'fp8' or 'nvfp4' for kinds 'csa' and 'hca'", "'" + format + "'");
    common.kv_format = format == "bf16" ? KvFormat::kBf16 : format == "fp8" ? KvFormat::kFp8 : KvFormat::kNvfp4;
    return kv_page_layout(common.kv_format);
  }

  DevicePages checked_pages(PageLayout layout, int64_t rows_per_page) const {
    pages.of(Type::kByte).with_dense_rows().on(value).aligned();
    if (rows_per_page <= 0) throw_value_error("rows_per_page", "a positive number", std::to_string(rows_per_page));
    const int64_t needed = rows_per_page * (layout.data_bytes + layout.scale_bytes);
    if (pages.size(1) < needed)
      throw_value_error("pages", fmt::format("at least {} bytes a page", needed), std::to_string(pages.size(1)));
    if (pages.row_stride() % 16 != 0)
      throw_value_error("pages", "a page stride that is a multiple of 16 bytes", std::to_string(pages.row_stride()));
    const int64_t num_rows = pages.size(0) * rows_per_page;
    if (num_rows > INT32_MAX) throw_value_error("pages", "fewer than 2^31 rows", std::to_string(num_rows));
    return {pages.data<uint8_t>(), pages.row_stride(), static_cast<int32_t>(rows_per_page),
            static_cast<int32_t>(num_rows)};
  }
};

void check_decode_indices(const CommonArrays& arrays, const Array& positions, const Array& states,
                          const Array& rope_rows, const Array& slots, int32_t num_rows, uint64_t stream) {
  const std::vector<int32_t> position = host_copy(positions, stream), state = host_copy(states, stream);
  std::vector<int32_t> rope_row = host_copy(rope_rows, stream);
  check_bounds("positions", position, 0, INT32_MAX, "positions");
  check_bounds("states", state, 0, arrays.state_value.size(0), "states");
  std::unordered_set<int32_t> seen;
  for (size_t token = 0; token < state.size(); ++token)
    if (!seen.insert(state[token]).second)
      throw_value_error("states", "a state of its own for each token",
                        fmt::format("{} again at [{}]", state[token], token));
  const std::vector<int32_t> slot = host_copy(slots, stream);
  std::unordered_set<int32_t> stored;
  for (size_t token = 0; token < rope_row.size(); ++token) {
    const bool completes = (static_cast<int64_t>(position[token]) + 1) % arrays.traits.ratio == 0;
    if (!completes) rope_row[token] = 0;  // not read
    if (completes && slot[token] >= 0 && slot[token] < num_rows && !stored.insert(slot[token]).second)
      throw_value_error("slots", "a row of its own for each completed window",
                        fmt::format("{} again at [{}]", slot[token], token));
  }
  check_bounds("rope_rows", rope_row, 0, arrays.cos_sin.size(0), "rows of cos_sin");
}

void compress_decode(std::string kind, nb::object value, nb::object gate, nb::object ape, nb::object norm_weight,
                     nb::object cos_sin, nb::object state_value, nb::object state_gate, nb::object pages,
                     nb::object slots_object, nb::object rope_rows_object, std::string row_format,
                     int64_t rows_per_page, nb::object positions_object, nb::object states_object, float rms_eps,
                     bool check_indices, uint64_t stream) {
  const CommonArrays arrays(kind, value, gate, ape, norm_weight, cos_sin, state_value, state_gate, pages);
  const Array positions("positions", positions_object, Access::kRead), states("states", states_object, Access::kRead);
  const Array rope_rows("rope_rows", rope_rows_object, Access::kRead), slots("slots", slots_object, Access::kRead);
  const CompressCommon common = arrays.checked(false, row_format, rows_per_page, rms_eps);
  for (const Array* array : {&positions, &states, &rope_rows, &slots})
    array->of(Type::kInt32).shaped({arrays.num_tokens()}).contiguous().on(arrays.value);
  if (check_indices || !arrays.value.device().cuda)
    check_decode_indices(arrays, positions, states, rope_rows, slots, common.pages.num_rows, stream);
  const CompressDecodeArgs args{common,
                                positions.data<const int32_t>(),
                                states.data<const int32_t>(),
                                rope_rows.data<const int32_t>(),
                                slots.data<const int32_t>(),
                                arrays.num_tokens()};
  run_where(arrays.value, stream, [&](const auto& context) { compress_quantize(args, context); });
}

void compress_prefill(std::string kind, nb::object value, nb::object gate, nb::object ape, nb::object norm_weight,
                      nb::object cos_sin, nb::object state_value, nb::object state_gate, nb::object pages,
                      nb::object slots_object, nb::object rope_rows_object, std::string row_format,
                      int64_t rows_per_page, int64_t first_position, float rms_eps, bool check_indices,
                      uint64_t stream) {
  const CommonArrays arrays(kind, value, gate, ape, norm_weight, cos_sin, state_value, state_gate, pages);
  const Array rope_rows("rope_rows", rope_rows_object, Access::kRead), slots("slots", slots_object, Access::kRead);
  const CompressCommon common = arrays.checked(true, row_format, rows_per_page, rms_eps);
  if (first_position < 0 || first_position > INT32_MAX - arrays.num_tokens())
    throw_value_error("first_position", "a position whose chunk ends below 2^31", std::to_string(first_position));
  const int64_t windows =
      (first_position + arrays.num_tokens()) / arrays.traits.ratio - first_position / arrays.traits.ratio;
  for (const Array* array : {&rope_rows, &slots})
    array->of(Type::kInt32).shaped({windows}).contiguous().on(arrays.value);
  if (check_indices || !arrays.value.device().cuda)
    check_bounds("rope_rows", host_copy(rope_rows, stream), 0, arrays.cos_sin.size(0), "rows of cos_sin");
  const CompressPrefillArgs args{common, first_position, arrays.num_tokens(), rope_rows.data<const int32_t>(),
                                 slots.data<const int32_t>()};
  run_where(arrays.value, stream, [&](const auto& context) { compress_quantize(args, context); });
}

}  // namespace

void bind_compress(nb::module_& module) {
  using namespace nb::literals;
  module.def("compress_decode", compress_decode, "kind"_a, "value"_a, "gate"_a, "ape"_a, "norm_weight"_a, "cos_sin"_a,
             "state_value"_a, "state_gate"_a, "pages"_a, "slots"_a, "rope_rows"_a, "row_format"_a, "rows_per_page"_a,
             "positions"_a, "states"_a, "rms_eps"_a, "check_indices"_a, "stream"_a);
  module.def("compress_prefill", compress_prefill, "kind"_a, "value"_a, "gate"_a, "ape"_a, "norm_weight"_a, "cos_sin"_a,
             "state_value"_a, "state_gate"_a, "pages"_a, "slots"_a, "rope_rows"_a, "row_format"_a, "rows_per_page"_a,
             "first_position"_a, "rms_eps"_a, "check_indices"_a, "stream"_a);
}

}  // namespace dsv4::py
