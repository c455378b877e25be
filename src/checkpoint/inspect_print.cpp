// The two forms of an InspectReport: aligned text for people, JSON for programs.
#include <fmt/format.h>

#include <algorithm>

#include "checkpoint/inspect.h"

namespace dsv4 {
namespace {

constexpr const char* kLayerKindNames[3] = {"window", "CSA", "HCA"};

std::string bytes_text(int64_t bytes) {
  const double value = static_cast<double>(bytes);
  if (value >= 1e9) return fmt::format("{:.2f} GB", value / 1e9);
  if (value >= 1e6) return fmt::format("{:.2f} MB", value / 1e6);
  if (value >= 1e3) return fmt::format("{:.2f} kB", value / 1e3);
  return fmt::format("{} B", bytes);
}

std::string count_text(int64_t count) {
  const double value = static_cast<double>(count);
  if (value >= 1e9) return fmt::format("{:.2f} G", value / 1e9);
  if (value >= 1e6) return fmt::format("{:.2f} M", value / 1e6);
  return fmt::format("{}", count);
}

class TextWriter {
 public:
  template <class... T>
  void field(const char* name, fmt::format_string<T...> format, T&&... args) {
    text_ += fmt::format("{:<12}", name) + fmt::format(format, std::forward<T>(args)...) + "\n";
  }
  template <class... T>
  void line(fmt::format_string<T...> format, T&&... args) {
    text_ += fmt::format(format, std::forward<T>(args)...) + "\n";
  }
  void share(std::string_view name, int64_t bytes, int64_t total) {
    line("  {:<26}{:>12}{:>8.1f} %", name, bytes_text(bytes),
         100.0 * static_cast<double>(bytes) / static_cast<double>(std::max<int64_t>(total, 1)));
  }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

void write_model(const InspectReport& r, TextWriter& out) {
  const ModelConfig& c = r.config;
  out.field("layers", "{}: {} window, {} CSA, {} HCA; {} hash-routed; {} draft configured", c.num_layers,
            r.num_layers_by_kind[0], r.num_layers_by_kind[1], r.num_layers_by_kind[2], c.num_hash_layers,
            c.num_mtp_layers);
  out.field("experts", "{} routed per layer, {} per token, {} shared; width {}", c.num_experts, c.num_topk,
            c.num_shared_experts, c.moe_inter);
  out.field("dimensions", "hidden {}, {} heads of {}, {} rotated; window {}; vocabulary {}", c.hidden, c.num_heads,
            c.head_dim, c.rope_dim, c.window_len, c.vocab_size);
  out.field("parameters", "{} total, {} active per token", count_text(r.parameters.total),
            count_text(r.parameters.active));
}

void write_kv(const InspectReport& r, TextWriter& out) {
  out.line("");
  out.line("cache of one sequence, bytes per token at a context of 4K, 64K and 1M tokens (and in all at 1M)");
  out.line("  {:<7}{:<7}{:>6}{:>6}{:>12}{:>12}{:>12}{:>12}{:>14}", "--kv", "--index", "row", "key", "fixed", "4K",
           "64K", "1M", "1M in all");
  for (const KvCost& cost : r.kv)
    out.line("  {:<7}{:<7}{:>6}{:>6}{:>12}{:>12.1f}{:>12.1f}{:>12.1f}{:>14}", cost.kv, cost.index, cost.row_bytes,
             cost.index_key_bytes, bytes_text(cost.fixed_bytes), cost.at[0].bytes_per_token(),
             cost.at[1].bytes_per_token(), cost.at[2].bytes_per_token(), bytes_text(cost.at[2].bytes));
}

Json kv_json(const KvCost& cost) {
  Json at = Json::array();
  for (const KvCost::At& entry : cost.at)
    at.push_back({{"context", entry.context}, {"bytes", entry.bytes}, {"bytes_per_token", entry.bytes_per_token()}});
  return {{"kv", cost.kv},
          {"index", cost.index},
          {"row_bytes", cost.row_bytes},
          {"index_key_bytes", cost.index_key_bytes},
          {"fixed_bytes", cost.fixed_bytes},
          {"growing_bytes_per_token", cost.growing_bytes_per_token},
          {"at", at}};
}

Json config_json(const InspectReport& r) {
  const ModelConfig& c = r.config;
  Json layers = {{"total", c.num_layers},
                 {"hash_routed", c.num_hash_layers},
                 {"draft_configured", c.num_mtp_layers},
                 {"compress_ratios", c.compress_ratios}};
  for (int kind = 0; kind < 3; ++kind) layers[kLayerKindNames[kind]] = r.num_layers_by_kind[kind];
  Json kv = Json::array();
  for (const KvCost& cost : r.kv) kv.push_back(kv_json(cost));
  return {{"layers", layers},
          {"experts",
           {{"routed", c.num_experts},
            {"per_token", c.num_topk},
            {"shared", c.num_shared_experts},
            {"width", c.moe_inter}}},
          {"dimensions",
           {{"vocab_size", c.vocab_size},
            {"hidden", c.hidden},
            {"num_heads", c.num_heads},
            {"head_dim", c.head_dim},
            {"rope_dim", c.rope_dim},
            {"window", c.window_len},
            {"index_num_heads", c.index_num_heads},
            {"index_head_dim", c.index_head_dim},
            {"index_topk", c.index_topk}}},
          {"parameters", {{"total", r.parameters.total}, {"active", r.parameters.active}}},
          {"kv_cache", kv}};
}

}  // namespace

std::string inspect_text(const InspectReport& r) {
  TextWriter out;
  out.field("folder", "{}", r.folder);
  if (!r.variant.empty()) out.field("variant", "{}", r.variant);
  out.field("files", "{} weight file{}, {} tensors, {}", r.num_files, r.num_files == 1 ? "" : "s", r.num_tensors,
            bytes_text(r.bytes));
  if (r.has_config) write_model(r, out);
  if (!r.tokenizer.empty()) out.field("tokenizer", "{}", r.tokenizer);
  if (r.num_files > 0) {
    if (r.has_config) {
      out.line("\nbytes by kind");
      for (int role = 0; role < kNumTensorRoles; ++role)
        if (r.bytes_by_role[role] > 0)
          out.share(tensor_role_name(static_cast<TensorRole>(role)), r.bytes_by_role[role], r.bytes);
      if (r.unknown_bytes > 0) out.share("unexpected", r.unknown_bytes, r.bytes);
    }
    out.line("\nbytes by format (scales included)");
    for (const auto& [format, bytes] : r.bytes_by_format) out.share(format, bytes, r.bytes);
  }
  if (r.has_config) write_kv(r, out);
  out.line("");
  if (r.usable)
    out.line("no problems found");
  else
    out.line("NOT USABLE, {}", r.problems.text());
  return out.take();
}

Json inspect_json(const InspectReport& r) {
  Json by_role = Json::object();
  for (int role = 0; role < kNumTensorRoles; ++role)
    by_role[std::string(tensor_role_name(static_cast<TensorRole>(role)))] = r.bytes_by_role[role];
  by_role["unexpected"] = r.unknown_bytes;
  return {{"folder", r.folder},
          {"usable", r.usable},
          {"variant", r.variant.empty() ? Json(nullptr) : Json(r.variant)},
          {"tokenizer", r.tokenizer.empty() ? Json(nullptr) : Json(r.tokenizer)},
          {"files", r.num_files},
          {"tensors", r.num_tensors},
          {"bytes", r.bytes},
          {"bytes_by_kind", r.has_config ? by_role : Json(nullptr)},
          {"bytes_by_format", r.bytes_by_format},
          {"model", r.has_config ? config_json(r) : Json(nullptr)},
          {"num_problems", r.problems.count()},
          {"problems", r.problems.listed()}};
}

}  // namespace dsv4
