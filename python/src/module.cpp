// dsv4._ops: the ops of ops/quantize on arrays that already exist. dsv4/__init__.py allocates outputs and picks streams.
//
// All arguments are checked here, before anything runs; None means absent. Nothing is copied or converted.
#include <nanobind/stl/string.h>

#include "array.h"
#include "base/check.h"
#include "device.h"
#include "module.h"
#include "ops/quantize/quantize.h"
#ifdef DSV4_PYTHON_CUDA
#include "ops/quantize/quantize_gpu.h"
#endif

namespace dsv4::py {
namespace {

constexpr int64_t kMaxWholeRow = 16384;  // of the kernels: columns where a row must be seen before it is written

RowFormat parse_format(const std::string& format) {
  if (format == "nvfp4") return RowFormat::kNvfp4;
  if (format == "fp8") return RowFormat::kFp8;
  if (format == "bf16") return RowFormat::kBf16;
  throw_value_error("format", "'nvfp4', 'fp8' or 'bf16'", "'" + format + "'");
}

SfLayout parse_layout(const std::string& layout) {
  if (layout == "linear") return SfLayout::kLinear;
  if (layout == "128x4") return SfLayout::k128x4;
  throw_value_error("sf_layout", "'linear' or '128x4'", "'" + layout + "'");
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// [matrices,] rows and groups as a scale tensor of this layout stores them.
std::vector<int64_t> sf_shape(SfLayout layout, std::vector<int64_t> lead, int64_t rows, int64_t groups) {
  const bool tiled = layout == SfLayout::k128x4;
  lead.push_back(tiled ? round_up(rows, 128) : rows);
  lead.push_back(tiled ? round_up(groups, 4) : groups);
  return lead;
}

GlobalMode check_global(const std::optional<Array>& global, const Array& first, int64_t num_rows) {
  if (!global) return GlobalMode::kOne;
  global->of(Type::kFloat32).contiguous().on(first);
  if (global->num_elements() == 1 && global->ndim() <= 1) return GlobalMode::kGiven;
  global->shaped({num_rows});
  return GlobalMode::kPerRow;
}

// The arguments every quantiser shares.
struct OutputArrays {
  RowFormat format;
  SfLayout layout;
  std::optional<Array> global_scale, codes, sf, y, row_global;

  OutputArrays(const std::string& format_name, const std::string& layout_name, nb::handle global_object,
               nb::handle codes_object, nb::handle sf_object, nb::handle y_object, nb::handle row_global_object)
      : format(parse_format(format_name)),
        layout(parse_layout(layout_name)),
        global_scale(optional_array("global_scale", global_object, Access::kRead)),
        codes(optional_array("codes", codes_object, Access::kWrite)),
        sf(optional_array("sf", sf_object, Access::kWrite)),
        y(optional_array(format == RowFormat::kBf16 ? "out" : "normalized", y_object, Access::kWrite)),
        row_global(optional_array("row_global", row_global_object, Access::kWrite)) {}

  // Results are [lead..., rows, ...]; each of the lead matrices has its own 128x4 scale tensor.
  QuantizedRows checked(const Array& first, const std::vector<int64_t>& lead, int64_t rows, int64_t cols) const {
    const int64_t step = format == RowFormat::kFp8 ? kFp8ActBlock : kNvfp4GroupSize;
    if (cols == 0 || cols % step != 0)
      throw_value_error(first.name(), "a positive multiple of " + std::to_string(step) + " columns",
                        std::to_string(cols));
    if (format != RowFormat::kNvfp4 && (global_scale || row_global))
      throw_value_error("global_scale", "None (only format 'nvfp4' has one)", "a value");
    if (format != RowFormat::kNvfp4 && layout != SfLayout::kLinear)
      throw_value_error("sf_layout", "'linear' (only format 'nvfp4' has another)", "'128x4'");
    int64_t num_rows = rows;
    for (const int64_t size : lead) num_rows *= size;
    QuantizedRows out{.format = format, .sf_layout = layout, .sf_matrix_rows = lead.empty() ? 0 : rows};
    check_codes(first, lead, rows, cols);
    if (format == RowFormat::kBf16 && !y) throw_value_error("out", "an array", "None");
    if (y) {
      y->of(Type::kBf16).shaped(with_tail(lead, rows, cols)).contiguous().on(first).aligned();
      out.y = y->data<bf16>();
    }
    out.codes = data_or_null<uint8_t>(codes), out.sf = data_or_null<uint8_t>(sf);
    if (row_global) {
      if (first.device().cuda && cols > kMaxWholeRow)
        throw_value_error(first.name(), "at most 16384 columns with global_scale='row'", std::to_string(cols));
      row_global->of(Type::kFloat32).shaped(with_tail(lead, rows)).contiguous().on(first);
      out.row_global = row_global->data<float>();
      out.global_mode = GlobalMode::kComputeRow;
    } else {
      out.global_mode = check_global(global_scale, first, num_rows);
      out.global = data_or_null<const float>(global_scale);
    }
    return out;
  }

 private:
  template <class... Sizes>
  static std::vector<int64_t> with_tail(std::vector<int64_t> lead, Sizes... sizes) {
    (lead.push_back(sizes), ...);
    return lead;
  }

  void check_codes(const Array& first, const std::vector<int64_t>& lead, int64_t rows, int64_t cols) const {
    if (format == RowFormat::kBf16) return;
    if (!codes || !sf) throw_value_error(codes ? "sf" : "codes", "an array", "None");
    const bool nvfp4 = format == RowFormat::kNvfp4;
    codes->of(Type::kByte).shaped(with_tail(lead, rows, nvfp4 ? cols / 2 : cols)).contiguous().on(first).aligned();
    sf->of(Type::kByte)
        .shaped(sf_shape(layout, lead, rows, cols / (nvfp4 ? kNvfp4GroupSize : kFp8ActBlock)))
        .contiguous()
        .on(first)
        .aligned();
  }
};

void check_row_stride(const Array& array) {
  array.with_dense_rows().aligned();
  if (array.device().cuda && array.row_stride() % 8 != 0)
    throw_value_error(array.name(), "a row stride that is a multiple of 8 elements",
                      std::to_string(array.row_stride()));
}

void py_quantize(nb::object x_object, nb::object norm_object, float norm_eps, std::string format, std::string layout,
                 nb::object global_scale, nb::object codes, nb::object sf, nb::object y, nb::object row_global,
                 uint64_t stream) {
  const Array x("x", x_object, Access::kRead);
  const std::optional<Array> norm = optional_array("norm_weight", norm_object, Access::kRead);
  const OutputArrays outputs(format, layout, global_scale, codes, sf, y, row_global);
  check_device(x);
  x.with_ndim(2).of_either(Type::kBf16, Type::kFloat32);
  check_row_stride(x);
  const int64_t num_rows = x.size(0), cols = x.size(1);
  if (norm) {
    norm->of(Type::kBf16).shaped({cols}).contiguous().on(x).aligned();
    if (x.device().cuda && cols > kMaxWholeRow)
      throw_value_error("x", "at most 16384 columns with norm_weight", std::to_string(cols));
  }
  const QuantizeArgs args{
      x.data<void>(), x.is(Type::kFloat32), data_or_null<const bf16>(norm),        norm_eps, num_rows,
      cols,           x.row_stride(),       outputs.checked(x, {}, num_rows, cols)};
  run_where(x, stream, [&](const auto& context) { quantize_rows(args, context); });
}

void py_swiglu_quantize(nb::object gate_object, nb::object up_object, nb::object rho_object, float limit,
                        std::string format, std::string layout, nb::object global_scale, nb::object codes,
                        nb::object sf, nb::object y, nb::object row_global, uint64_t stream) {
  const Array gate("gate", gate_object, Access::kRead), up("up", up_object, Access::kRead);
  const std::optional<Array> rho = optional_array("rho", rho_object, Access::kRead);
  const OutputArrays outputs(format, layout, global_scale, codes, sf, y, row_global);
  check_device(gate);
  gate.with_ndim(2).of(Type::kBf16);
  check_row_stride(gate);
  const int64_t num_rows = gate.size(0), cols = gate.size(1);
  up.of(Type::kBf16).shaped({num_rows, cols}).on(gate);
  check_row_stride(up);
  if (up.row_stride() != gate.row_stride())
    throw_value_error("up", "gate's row stride of " + std::to_string(gate.row_stride()) + " elements",
                      std::to_string(up.row_stride()));
  if (rho) rho->of(Type::kFloat32).shaped({num_rows}).contiguous().on(gate);
  if (!(limit > 0 && limit <= 80)) throw_value_error("limit", "0 < limit <= 80", std::to_string(limit));
  const SwigluQuantizeArgs args{gate.data<const bf16>(),
                                up.data<const bf16>(),
                                data_or_null<const float>(rho),
                                limit,
                                num_rows,
                                cols,
                                gate.row_stride(),
                                outputs.checked(gate, {}, num_rows, cols)};
  run_where(gate, stream, [&](const auto& context) { swiglu_quantize(args, context); });
}

void py_inverse_rope_quantize(nb::object x_object, nb::object cos_sin_object, nb::object positions_object,
                              int64_t heads_per_group, bool check_positions, std::string format, std::string layout,
                              nb::object global_scale, nb::object codes, nb::object sf, nb::object y,
                              nb::object row_global, uint64_t stream) {
  const Array x("x", x_object, Access::kRead), cos_sin("cos_sin", cos_sin_object, Access::kRead),
      positions("positions", positions_object, Access::kRead);
  const OutputArrays outputs(format, layout, global_scale, codes, sf, y, row_global);
  check_device(x);
  x.with_ndim(3).of(Type::kBf16).contiguous().aligned();
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2);
  cos_sin.of(Type::kFloat32).with_ndim(2).contiguous().on(x).aligned();
  const int64_t rope_dim = cos_sin.size(1), step = x.device().cuda ? 16 : 2;
  if (rope_dim % step != 0 || rope_dim > head_dim)
    throw_value_error(
        "cos_sin",
        "[num_positions, rope_dim] with rope_dim a multiple of " + std::to_string(step) + ", at most head_dim",
        "rope_dim " + std::to_string(rope_dim) + ", head_dim " + std::to_string(head_dim));
  if (x.device().cuda && (head_dim % 16 != 0 || (head_dim & (head_dim - 1)) != 0))
    throw_value_error("x", "head_dim a power of two, at least 16", std::to_string(head_dim));
  positions.of(Type::kInt32).shaped({tokens}).contiguous().on(x);
  if (heads_per_group <= 0 || heads % heads_per_group != 0)
    throw_value_error("heads_per_group", "a divisor of num_heads " + std::to_string(heads),
                      std::to_string(heads_per_group));
  const QuantizedRows out = outputs.checked(x, {heads / heads_per_group}, tokens, heads_per_group * head_dim);
  if (check_positions || !x.device().cuda)
    check_bounds("positions", host_copy(positions, stream), 0, cos_sin.size(0), "rows of cos_sin");
  const InverseRopeQuantizeArgs args{x.data<const bf16>(),
                                     cos_sin.data<const float>(),
                                     positions.data<const int32_t>(),
                                     tokens,
                                     static_cast<int>(heads),
                                     static_cast<int>(head_dim),
                                     static_cast<int>(rope_dim),
                                     static_cast<int>(heads_per_group),
                                     out};
  run_where(x, stream, [&](const auto& context) { inverse_rope_quantize(args, context); });
}

// indices None: all rows.
void py_dequantize(nb::object codes_object, nb::object sf_object, nb::object indices_object, nb::object global_object,
                   std::string layout_name, bool check_indices, nb::object y_object, uint64_t stream) {
  const Array codes("codes", codes_object, Access::kRead), sf("sf", sf_object, Access::kRead),
      y("out", y_object, Access::kWrite);
  const std::optional<Array> indices = optional_array("indices", indices_object, Access::kRead);
  const std::optional<Array> global = optional_array("global_scale", global_object, Access::kRead);
  const SfLayout layout = parse_layout(layout_name);
  check_device(codes);
  codes.of(Type::kByte).with_ndim(2).contiguous().aligned();
  const int64_t num_rows = codes.size(0), cols = codes.size(1) * 2;
  if (cols == 0 || cols % kNvfp4GroupSize != 0)
    throw_value_error("codes", "a positive multiple of 8 bytes a row", std::to_string(codes.size(1)));
  sf.of(Type::kByte).contiguous().on(codes).aligned();
  const std::vector<int64_t> stored = sf_shape(layout, {}, num_rows, cols / kNvfp4GroupSize);
  if (layout == SfLayout::k128x4)
    sf.shaped_or_flat(stored);
  else
    sf.shaped(stored);
  if (indices) {
    indices->of(Type::kInt32).with_ndim(1).contiguous().on(codes);
    if (check_indices || !codes.device().cuda)
      check_bounds("indices", host_copy(*indices, stream), -1, num_rows, "rows of codes; -1 gives zeros");
  }
  const int64_t num_out = indices ? indices->size(0) : num_rows;
  y.of_either(Type::kFloat32, Type::kBf16).shaped({num_out, cols}).contiguous().on(codes).aligned();
  const DequantizeArgs args{.codes = codes.data<const uint8_t>(),
                            .sf = sf.data<const uint8_t>(),
                            .global = data_or_null<const float>(global),
                            .rows = data_or_null<const int32_t>(indices),
                            .bad_rows = nullptr,
                            .y = y.data<void>(),
                            .y_is_f32 = y.is(Type::kFloat32),
                            .global_mode = check_global(global, codes, num_rows),
                            .sf_layout = layout,
                            .num_rows = num_rows,
                            .num_out = num_out,
                            .cols = cols};
  run_where(codes, stream, [&](const auto& context) { dequantize_rows(args, context); });
}

}  // namespace
}  // namespace dsv4::py

NB_MODULE(_ops, module) {
  using namespace dsv4::py;
  using namespace nanobind::literals;
  // The checks above throw ValueError; what the library itself still finds (CUDA, memory, a broken invariant) is a RuntimeError.
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const dsv4::Error& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
  });
  module.def("quantize", py_quantize, "x"_a, "norm_weight"_a.none(), "norm_eps"_a, "format"_a, "sf_layout"_a,
             "global_scale"_a.none(), "codes"_a.none(), "sf"_a.none(), "y"_a.none(), "row_global"_a.none(), "stream"_a);
  module.def("swiglu_quantize", py_swiglu_quantize, "gate"_a, "up"_a, "rho"_a.none(), "limit"_a, "format"_a,
             "sf_layout"_a, "global_scale"_a.none(), "codes"_a.none(), "sf"_a.none(), "y"_a.none(),
             "row_global"_a.none(), "stream"_a);
  module.def("inverse_rope_quantize", py_inverse_rope_quantize, "x"_a, "cos_sin"_a, "positions"_a, "heads_per_group"_a,
             "check_positions"_a, "format"_a, "sf_layout"_a, "global_scale"_a.none(), "codes"_a.none(), "sf"_a.none(),
             "y"_a.none(), "row_global"_a.none(), "stream"_a);
  module.def("dequantize", py_dequantize, "codes"_a, "sf"_a, "indices"_a.none(), "global_scale"_a.none(), "sf_layout"_a,
             "check_indices"_a, "y"_a, "stream"_a);
  bind_compress(module);
#ifdef DSV4_PYTHON_CUDA
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
}
