// Recognising how one matrix is stored, and finding scales and expert ids that cannot be used.
#include "checkpoint/stored_matrix.h"

#include <limits>

#include "checkpoint_test_util.h"

namespace dsv4 {
namespace {

TEST(StoredMatrix, IncompleteOrInconsistentStorageIsNamed) {
  struct Case {
    SynthVariant variant;
    std::function<void(std::map<std::string, EditableFile::Tensor>&)> change;
    std::vector<std::string_view> parts;
  };
  const std::string w = "layers.1.ffn.experts.0.w1";
  const std::string d = "layers.1.attn.wq_b";
  const Case cases[] = {
      {SynthVariant::kOfficial, [&](auto& t) { t.erase(w + ".scale"); }, {w, "MXFP4", "no .scale"}},
      {SynthVariant::kOfficial,
       [&](auto& t) { t.at(w + ".scale").dtype = DType::kU8; },
       {w, ".scale: dtype U8", "F8_E8M0"}},
      {SynthVariant::kOfficial,
       [&](auto& t) {
         t.at(w + ".scale").shape = {32, 6};
       },
       {w, ".scale: shape [32, 6], expected [64, 3]"}},
      {SynthVariant::kOfficial, [&](auto& t) { t.erase(d + ".scale"); }, {d, "F8_E4M3", "no .scale"}},
      {SynthVariant::kOfficial,
       [&](auto& t) {
         t.at(d + ".scale").shape = {1, 3};
       },
       {d, ".scale: shape [1, 3], expected [3, 1]"}},
      {SynthVariant::kOfficial,
       [&](auto& t) { t.at(d + ".scale").dtype = DType::kI8; },
       {d, ".scale: dtype I8", "F8_E8M0 or F32 or BF16"}},
      {SynthVariant::kOfficial,
       [&](auto& t) { t[d + ".weight_scale"] = t.at(d + ".scale"); },
       {d, "both .scale and .weight_scale"}},
      {SynthVariant::kOfficial,
       [&](auto& t) { t.at(d + ".weight").shape = {288 * 80}; },
       {d, "shape [23040], expected a matrix"}},
      {SynthVariant::kModelOpt, [&](auto& t) { t.erase(w + ".weight_scale"); }, {w, "U8 (NVFP4)", "no .weight_scale"}},
      {SynthVariant::kModelOpt,
       [&](auto& t) { t.erase(w + ".weight_scale_2"); },
       {w, "U8 (NVFP4)", "no .weight_scale_2"}},
      {SynthVariant::kModelOpt,
       [&](auto& t) {
         t.at(w + ".weight_scale").shape = {6, 64};
       },
       {w, ".weight_scale: shape [6, 64], expected [64, 6]"}},
      {SynthVariant::kModelOpt,
       [&](auto& t) { t.at(w + ".weight_scale").dtype = DType::kF8E8M0; },
       {w, ".weight_scale: dtype F8_E8M0, expected F8_E4M3"}},
      {SynthVariant::kModelOpt,
       [&](auto& t) {
         t[w + ".weight_scale_2"] = {DType::kF32, {2}, std::string(8, '\0')};
       },
       {w, ".weight_scale_2: F32 [2]", "one F32"}},
      {SynthVariant::kModelOpt,
       [&](auto& t) {
         t[w + ".weight_scale_2"] = {DType::kBf16, {}, "xx"};
       },
       {w, ".weight_scale_2: BF16", "one F32"}},
      {SynthVariant::kModelOpt,
       [&](auto& t) { t[w + ".weight_packed"] = t.at(w + ".weight"); },
       {w, "both .weight and .weight_packed"}},
      {SynthVariant::kModelOpt,
       [&](auto& t) {
         t[w + ".scale"] = {DType::kU8, {1}, "x"};
       },
       {w, "unexpected tensor ", ".scale"}},
      {SynthVariant::kCompressed, [&](auto& t) { t.erase(w + ".weight_scale"); }, {w, "no .weight_scale"}},
      {SynthVariant::kCompressed,
       [&](auto& t) { t.erase(w + ".weight_global_scale"); },
       {w, "no .weight_global_scale"}},
      {SynthVariant::kCompressed,
       [&](auto& t) { t.at(w + ".weight_packed").dtype = DType::kI8; },
       {w, ".weight_packed: dtype I8, expected U8"}},
      {SynthVariant::kBf16, [&](auto& t) { t.at(w + ".weight").dtype = DType::kF16; }, {w, "dtype F16", "U8 (NVFP4)"}},
  };
  for (size_t i = 0; i < std::size(cases); ++i) {
    SCOPED_TRACE(i);
    EditedCheckpoint checkpoint(cases[i].variant);
    checkpoint.edit(cases[i].change);
    for (std::string_view part : cases[i].parts) checkpoint.expect_refused({part});
  }
}

TEST(StoredMatrix, GlobalScalesMustBeFiniteAndPositive) {
  const std::string w = "layers.1.ffn.experts.0.w1";
  const float bad[] = {0.0f, -0.0f, -1.0f, std::numeric_limits<float>::infinity(),
                       std::numeric_limits<float>::quiet_NaN()};
  for (const auto& [variant, suffix] :
       {std::pair{SynthVariant::kModelOpt, ".weight_scale_2"}, std::pair{SynthVariant::kModelOpt, ".input_scale"},
        std::pair{SynthVariant::kCompressed, ".weight_global_scale"},
        std::pair{SynthVariant::kCompressed, ".input_global_scale"}})
    for (float value : bad) {
      EditedCheckpoint checkpoint(variant);
      checkpoint.edit([&, suffix = suffix](auto& tensors) { tensors.at(w + suffix).bytes = float_bytes(value); });
      checkpoint.expect_refused({w + suffix, "finite positive"});
    }
  EditedCheckpoint checkpoint(SynthVariant::kCompressed);
  checkpoint.edit([&](auto& tensors) { tensors.at(w + ".weight_global_scale").bytes = float_bytes(1e-39f); });
  checkpoint.expect_refused({w + ".weight_global_scale", "reciprocal"});
}

TEST(StoredMatrix, BadScaleBytesAreFoundWhereverTheyAre) {
  struct Case {
    SynthVariant variant;
    std::string matrix, scale;
    std::string bytes;  // one scale element
    std::string_view printed;
  };
  const std::string w = "layers.1.ffn.experts.0.w1", d = "layers.1.attn.wq_b";
  const Case cases[] = {
      {SynthVariant::kOfficial, w, ".scale", "\xff", "0xff"},
      {SynthVariant::kOfficial, d, ".scale", "\xff", "0xff"},
      {SynthVariant::kModelOpt, w, ".weight_scale", "\x7f", "0x7f"},
      {SynthVariant::kModelOpt, w, ".weight_scale", "\xff", "0xff"},
      {SynthVariant::kModelOpt, w, ".weight_scale", "\xb8", "0xb8"},
      {SynthVariant::kCompressed, w, ".weight_scale", "\x7f", "0x7f"},
      {SynthVariant::kCompressed, d, ".weight_scale", "\xc0\x7f", "0x7fc0"},
      {SynthVariant::kCompressed, d, ".weight_scale", "\x80\x7f", "0x7f80"},
      {SynthVariant::kCompressed, d, ".weight_scale", "\x80\xbf", "0xbf80"},
  };
  for (const Case& c : cases) {
    EditedCheckpoint checkpoint(c.variant);
    const Shape shape = SafetensorsFile(checkpoint.folder() / "model.safetensors").at(c.matrix + c.scale).shape;
    const int64_t count = num_elements(shape);
    for (int64_t at : {int64_t{0}, count / 2, count - 1}) {
      SCOPED_TRACE(fmt::format("{}{} {}", c.matrix, c.scale, at));
      std::string before;
      checkpoint.edit([&](auto& tensors) {
        std::string& bytes = tensors.at(c.matrix + c.scale).bytes;
        before = bytes;
        bytes.replace(at * c.bytes.size(), c.bytes.size(), c.bytes);
      });
      const Checkpoint opened = open_checkpoint(checkpoint.folder().path());
      const StoredMatrix matrix = opened.matrix(c.matrix);
      expect_bad_input({checkpoint.folder() / "model.safetensors: ", c.matrix, c.printed,
                        fmt::format("row {}, group {}", at / shape[1], at % shape[1])},
                       [&] { validate_scales(matrix); });
      checkpoint.edit([&](auto& tensors) { tensors.at(c.matrix + c.scale).bytes = before; });
    }
    const Checkpoint restored = open_checkpoint(checkpoint.folder().path());
    validate_scales(restored.matrix(c.matrix));
  }
}

TEST(StoredMatrix, F32BlockScalesMustBeFinite) {
  std::vector<float> scales(6, 1.0f);
  StoredMatrix matrix;
  matrix.name = "m";
  matrix.format = StoredFormat::kFp8Block;
  matrix.scale = {DType::kF32, {2, 3}, reinterpret_cast<const std::byte*>(scales.data())};
  EXPECT_EQ(find_scale_problem(matrix), std::nullopt);
  for (float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), -1.0f}) {
    scales[4] = bad;
    expect_bad_input({"m:", "row 1, group 1", "F32"}, [&] { validate_scales(matrix); });
  }
}

TEST(ExpertTable, IdsOutOfRangeAreFound) {
  const std::vector<int64_t> good{0, 1, 4, 2};
  validate_expert_table("t", {DType::kI64, {2, 2}, reinterpret_cast<const std::byte*>(good.data())}, 5);
  for (int64_t bad : {int64_t{-1}, int64_t{5}, int64_t{1} << 40, INT64_MIN, INT64_MAX}) {
    const std::vector<int64_t> ids{0, 1, 4, bad};
    expect_bad_input({"t:", fmt::format("expert {}", bad), "token 1", "0 to 4"}, [&] {
      validate_expert_table("t", {DType::kI64, {2, 2}, reinterpret_cast<const std::byte*>(ids.data())}, 5);
    });
  }
  const std::vector<int32_t> narrow{0, -7};
  expect_bad_input({"expert -7", "token 1"}, [&] {
    validate_expert_table("t", {DType::kI32, {2, 1}, reinterpret_cast<const std::byte*>(narrow.data())}, 5);
  });
}

}  // namespace
}  // namespace dsv4
