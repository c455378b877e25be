// The texts of DeepSeek-V4's special tokens (spec section 8.1). The bars are U+FF5C, the separators U+2581.
#pragma once

#include <string_view>

namespace dsv4 {

inline constexpr std::string_view kBosToken = "<｜begin▁of▁sentence｜>";
inline constexpr std::string_view kEosToken = "<｜end▁of▁sentence｜>";
inline constexpr std::string_view kUserToken = "<｜User｜>";
inline constexpr std::string_view kAssistantToken = "<｜Assistant｜>";
inline constexpr std::string_view kLatestReminderToken = "<｜latest_reminder｜>";
inline constexpr std::string_view kThinkToken = "<think>";
inline constexpr std::string_view kEndThinkToken = "</think>";
inline constexpr std::string_view kDsmlToken = "｜DSML｜";  // tags are written < or </, this, a name

}  // namespace dsv4
