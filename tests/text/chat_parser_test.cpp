// Completions: well-formed ones round-trip with the encoder, every deviation is an error that names its place.
#include "text/chat_parser.h"

#include <gtest/gtest.h>

#include <random>

#include "expect_error.h"
#include "text/utf8.h"
#include "tiny_tokenizer.h"

namespace dsv4::test {
namespace {

constexpr auto kChat = ThinkingMode::kChat;
constexpr auto kThinking = ThinkingMode::kThinking;

const std::string kOpen = "\n\n<｜DSML｜tool_calls>\n";
const std::string kClose = "</｜DSML｜tool_calls>";

std::string invoke(const std::string& name, const std::string& parameters) {
  return "<｜DSML｜invoke name=\"" + name + "\">\n" + parameters + "</｜DSML｜invoke>\n";
}
std::string parameter(const std::string& name, bool is_string, const std::string& value) {
  return "<｜DSML｜parameter name=\"" + name + "\" string=\"" + (is_string ? "true" : "false") + "\">" + value +
         "</｜DSML｜parameter>\n";
}

TEST(ChatParser, ChatModeReadsContentUpToEos) {
  const ParsedCompletion parsed = parse_completion("Hello <b>\n\nthere" + kEos, kChat);
  EXPECT_EQ(parsed.content, "Hello <b>\n\nthere");
  EXPECT_EQ(parsed.reasoning, "");
  EXPECT_TRUE(parsed.tool_calls.empty());
}

TEST(ChatParser, ThinkingModeReadsReasoningUpToTheFirstEndOfThinking) {
  const ParsedCompletion parsed = parse_completion("why</think>because" + kEos, kThinking);
  EXPECT_EQ(parsed.reasoning, "why");
  EXPECT_EQ(parsed.content, "because");
}

TEST(ChatParser, StringParametersAreQuotedOthersAreRawJson) {
  const ParsedCompletion parsed =
      parse_completion("Let me look." + kOpen +
                           invoke("f", parameter("s", true, "a \"b\"\n</x> é") + parameter("n", false, "1.50") +
                                           parameter("o", false, "{\"k\": [1]}")) +
                           invoke("g", "\n") + kClose + kEos,
                       kChat);
  EXPECT_EQ(parsed.content, "Let me look.");
  ASSERT_EQ(parsed.tool_calls.size(), 2u);
  EXPECT_EQ(parsed.tool_calls[0].name, "f");
  EXPECT_EQ(parsed.tool_calls[0].arguments, R"({"s": "a \"b\"\n</x> é", "n": 1.50, "o": {"k": [1]}})");
  EXPECT_EQ(parsed.tool_calls[1].name, "g");
  EXPECT_EQ(parsed.tool_calls[1].arguments, "{}");
}

TEST(ChatParser, WhatTheEncoderWritesIsReadBack) {
  const std::vector<ToolCall> calls = {{"1", "f", R"({"a": "x\ny", "b": [1, 2], "c": null})"}, {"2", "g", "{}"}};
  const std::vector<Message> messages = {
      {.role = Role::kUser, .content = "U"},
      {.role = Role::kAssistant, .content = "A\n", .reasoning = "R\n", .tool_calls = calls}};
  const std::string text = encode_chat(messages, {.mode = kThinking}, ChatTexts{}).text();
  const std::string prompt = encode_chat(std::span(messages).first(1), {.mode = kThinking}, ChatTexts{}).text();
  ASSERT_TRUE(text.starts_with(prompt));
  const ParsedCompletion parsed = parse_completion(text.substr(prompt.size()), kThinking);
  EXPECT_EQ(parsed.reasoning, "R\n");
  EXPECT_EQ(parsed.content, "A\n");
  ASSERT_EQ(parsed.tool_calls.size(), calls.size());
  for (size_t i = 0; i < calls.size(); ++i) {
    EXPECT_EQ(parsed.tool_calls[i].name, calls[i].name);
    EXPECT_EQ(parsed.tool_calls[i].arguments, calls[i].arguments);
  }
}

TEST(ChatParser, EveryDeviationIsAnErrorThatNamesPlaceAndExpectation) {
  const std::string call = invoke("f", parameter("a", true, "v"));
  const struct {
    ThinkingMode mode;
    std::string text;
    const char* expected;
  } cases[] = {
      {kThinking, "no end" + kEos, "</think> at the end of the reasoning"},
      {kThinking, "R" + kOpen + call + kClose + "</think>" + kEos, "byte 1: expected </think>"},
      {kThinking, "<think>R</think>A" + kEos, "byte 0: expected text without special tokens"},
      {kThinking, "R" + kBos + "</think>A" + kEos, "byte 1: expected text without special tokens"},
      {kChat, "A", "byte 1: expected EOS or a tool block"},
      {kChat, "", "byte 0: expected EOS or a tool block"},
      {kChat, "A</think>B" + kEos, "byte 1: expected text without special tokens"},
      {kChat, "A" + kDsml + kEos, "byte 1: expected text without special tokens"},
      {kChat, "A" + kEos + "B", "expected nothing after EOS, found \"B\""},
      {kChat, kOpen + call + kClose + "\n" + kEos, "expected \"<｜end▁of▁sentence｜>\", found \"\\n<"},
      {kChat, "\n\n<｜DSML｜tool_calls x>\n" + call + kClose + kEos, "expected \">\\n\", found \" x>"},
      {kChat, kOpen + "text" + call + kClose + kEos, "an invoke or the end of the tool block, found \"text"},
      {kChat, kOpen + "<｜DSML｜invoke nam=\"f\">\n</｜DSML｜invoke>\n" + kClose + kEos, "expected \"name=\\\"\""},
      {kChat, kOpen + "<｜DSML｜invoke name=\"f\"></｜DSML｜invoke>\n" + kClose + kEos, "at the end of the invoke tag"},
      {kChat, kOpen + invoke("f", "text\n") + kClose + kEos, "at the end of the invoke tag"},
      {kChat, kOpen + invoke("f", parameter("a", true, "1") + parameter("a", true, "2")) + kClose + kEos,
       "a parameter name that is new"},
      {kChat,
       kOpen + invoke("f", "<｜DSML｜parameter name=\"a\" string=\"maybe\">1</｜DSML｜parameter>\n") + kClose + kEos,
       "a parameter tag"},
      {kChat,
       kOpen + invoke("f", "<｜DSML｜parameter  name=\"a\" string=\"true\">1</｜DSML｜parameter>\n") + kClose + kEos,
       "expected \" name=\\\"\""},
      {kChat, kOpen + invoke("f", parameter("a", true, "1") + "\n") + kClose + kEos,
       "a parameter or the end of the invoke, found \"\\n"},
      {kChat, kOpen + "<｜DSML｜invoke name=\"f\">\n\n</｜DSML｜invoke>" + kClose + kEos, "expected \">\\n\""},
  };
  for (const auto& c : cases)
    EXPECT_BAD_INPUT(parse_completion(c.text, c.mode), "completion: byte ", c.expected) << c.text;
}

TEST(ChatParser, EveryTruncationIsAnErrorExceptBehindTheClosedToolBlock) {
  const std::string whole = "R</think>A" + kOpen + invoke("f", parameter("a", true, "v")) + invoke("g", "\n") + kClose;
  for (size_t length = 0; length < whole.size(); ++length)
    EXPECT_BAD_INPUT(parse_completion(std::string_view(whole).substr(0, length), kThinking), "completion: byte ")
        << length;
  EXPECT_EQ(parse_completion(whole, kThinking).tool_calls.size(), 2u);
  EXPECT_EQ(parse_completion(whole + kEos, kThinking).tool_calls.size(), 2u);
}

TEST(ChatParser, ErrorsQuoteWholeCharactersOnly) {
  for (size_t pad = 0; pad < 6; ++pad) {
    try {
      parse_completion(kOpen + std::string(pad, 'x') + "你你你你你你你你你你你你你你你你你你你你你你你你你你你你你你",
                       kChat);
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(valid_utf8_prefix(error.what()), std::string_view(error.what()).size());
    }
  }
}

TEST(CompletionStream, AnyCutGivesTheReasoningContentAndCallsOfTheWhole) {
  std::mt19937 random(4);
  const std::string with_tools =
      "R <th\n\n<x</think>A \n\n<y" + kOpen + invoke("f", parameter("a", true, "v")) + kClose + kEos;
  const std::string without = "think\n\n</think>answer\n\n" + kEos;
  for (const std::string& text : {with_tools, without}) {
    const ParsedCompletion whole = parse_completion(text, kThinking);
    for (int round = 0; round < 200; ++round) {
      CompletionStream stream(kThinking);
      std::string reasoning, content;
      for (size_t at = 0; at < text.size();) {
        const size_t length = 1 + random() % (1 + static_cast<size_t>(round) / 8);
        const auto delta = stream.push(std::string_view(text).substr(at, length));
        reasoning += delta.reasoning;
        content += delta.content;
        at += length;
      }
      EXPECT_EQ(reasoning, whole.reasoning);
      EXPECT_EQ(content, whole.content);
      EXPECT_EQ(stream.finish().tool_calls.size(), whole.tool_calls.size());
    }
  }
}

TEST(CompletionStream, TextIsHandedOutAsSoonAsItIsCertain) {
  CompletionStream stream(kThinking);
  EXPECT_EQ(stream.push("because").reasoning, "because");
  EXPECT_EQ(stream.push(" </th").reasoning, " ");
  const auto delta = stream.push("ink>yes\n");
  EXPECT_EQ(delta.reasoning, "");
  EXPECT_EQ(delta.content, "yes");
  EXPECT_EQ(stream.push("\nno").content, "\n\nno");
  EXPECT_BAD_INPUT(stream.finish(), "expected EOS");
}

TEST(CompletionStream, MarkupInTheWrongPlaceThrowsAtOnce) {
  CompletionStream reasoning(kThinking);
  EXPECT_BAD_INPUT(reasoning.push("R" + kOpen), "byte 1: expected </think>");
  CompletionStream content(kChat);
  content.push("A</thi");
  EXPECT_BAD_INPUT(content.push("nk>"), "byte 1: expected text without special tokens");
  CompletionStream cut(kThinking);
  EXPECT_BAD_INPUT(cut.push("R" + kEos), "byte 1: expected text without special tokens");
}

}  // namespace
}  // namespace dsv4::test
