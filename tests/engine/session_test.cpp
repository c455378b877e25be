// Sessions: sync does the least work and gives the same logits; generation ends where it should; perplexity by definition.
#include <gtest/gtest.h>

#include <cmath>

#include "base/check.h"
#include "engine/engine.h"
#include "engine/eval.h"
#include "engine/generate.h"

namespace dsv4 {
namespace {

const std::string kBundled = DSV4_SOURCE_DIR "/models/demo";

class SessionTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    EngineOptions options;
    options.precision = Precision::make_exact();
    options.num_threads = 2;
    options.max_chunk = 32;
    engine_ = Engine::open(kBundled, options);
  }
  static void TearDownTestSuite() { engine_.reset(); }

  static std::vector<TokenId> ids(const std::string& text) {
    std::vector<TokenId> result{static_cast<TokenId>(engine_->config().bos_token_id)};
    const auto encoded = engine_->tokenizer().encode(text);
    result.insert(result.end(), encoded.begin(), encoded.end());
    return result;
  }
  static std::vector<float> fresh_logits(const std::vector<TokenId>& tokens) {
    Session session(*engine_);
    session.sync(tokens);
    return {session.logits().begin(), session.logits().end()};
  }
  static void expect_logits(const Session& session, const std::vector<TokenId>& tokens) {
    const auto expected = fresh_logits(tokens);
    ASSERT_EQ(session.logits().size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(session.logits()[i], expected[i], 1e-4);
    EXPECT_EQ(session.tokens(), tokens);
  }
  // Tokens that sync computed.
  static int64_t computed(Session& session, const std::vector<TokenId>& tokens) {
    int64_t count = 0;
    session.sync(tokens, [&](int64_t, int64_t total) {
      count = total;
      return true;
    });
    return count;
  }
  static std::unique_ptr<Engine> engine_;
};
std::unique_ptr<Engine> SessionTest::engine_;

const char* const kText =
    "It was a dark and stormy night, and Mr. Holmes had not yet returned from the moor; the fire was low and the wind "
    "was high "
    "about the house, and I sat alone with my thoughts and with the letter that had come in the evening.";

TEST_F(SessionTest, ExtendingComputesOnlyWhatIsNew) {
  const auto all = ids(kText);
  const std::vector<TokenId> start(all.begin(), all.begin() + 20);
  Session session(*engine_);
  EXPECT_EQ(computed(session, start), 20);
  EXPECT_EQ(computed(session, all), static_cast<int64_t>(all.size()) - 20);
  expect_logits(session, all);
  EXPECT_EQ(computed(session, all), 0);
  expect_logits(session, all);
}

TEST_F(SessionTest, AnotherContinuationGoesBackToTheMark) {
  const auto all = ids(kText);
  const std::vector<TokenId> start(all.begin(), all.begin() + 25);
  auto other = start;
  for (TokenId id : {100, 200, 300}) other.push_back(id);
  Session session(*engine_);
  session.sync(start);
  session.mark();
  session.sync(all);
  EXPECT_EQ(computed(session, other), 3);
  expect_logits(session, other);
  // Back to the mark itself.
  EXPECT_EQ(computed(session, start), 0);
  expect_logits(session, start);
  // A prefix before the mark starts over.
  const std::vector<TokenId> shorter(all.begin(), all.begin() + 10);
  EXPECT_EQ(computed(session, shorter), 10);
  expect_logits(session, shorter);
}

TEST_F(SessionTest, StoppingAPrefillKeepsAConsistentPrefix) {
  const auto all = ids(kText);
  ASSERT_GT(all.size(), 40u);
  Session session(*engine_);
  EXPECT_FALSE(session.sync(all, [](int64_t done, int64_t) { return done == 0; }));
  EXPECT_EQ(session.tokens().size(), 32u);  // one chunk
  EXPECT_TRUE(session.sync(all));
  expect_logits(session, all);
}

// A prefill stopped between chunks has no logits yet; asking for exactly that prefix must compute them, also when it is then marked.
TEST_F(SessionTest, SyncToWhereAPrefillStoppedHasLogits) {
  const std::vector<TokenId> all = ids(kText);
  ASSERT_GT(all.size(), 33u);
  const std::vector<TokenId> first(all.begin(), all.begin() + 32);  // one chunk
  Session session(*engine_);
  EXPECT_FALSE(session.sync(all, [](int64_t done, int64_t) { return done == 0; }));
  ASSERT_EQ(session.tokens(), first);
  EXPECT_TRUE(session.sync(first));
  expect_logits(session, first);
}

TEST_F(SessionTest, GenerationStopsAtLengthStopStringAndInterruption) {
  const auto prompt = ids("It was late");
  GenerateOptions options;
  options.sampling.temperature = 0;
  options.max_tokens = 12;
  Session session(*engine_);
  std::string streamed;
  GenerateCallbacks callbacks;
  callbacks.on_text = [&](std::string_view text) { streamed += text; };
  const GenerateResult whole = generate(*engine_, session, prompt, options, callbacks);
  EXPECT_EQ(whole.ids.size(), 12u);
  EXPECT_EQ(whole.finish_reason, FinishReason::kLength);
  EXPECT_EQ(streamed, whole.text);
  EXPECT_EQ(engine_->tokenizer().decode(whole.ids), whole.text);

  options.stop = {whole.text.substr(whole.text.size() / 2, 4)};
  const GenerateResult stopped = generate(*engine_, session, prompt, options);
  EXPECT_EQ(stopped.finish_reason, FinishReason::kStopString);
  EXPECT_EQ(stopped.text, whole.text.substr(0, whole.text.find(options.stop[0])));

  options.stop.clear();
  int calls = 0;
  callbacks = {};
  callbacks.keep_going = [&] { return ++calls < 6; };
  const GenerateResult interrupted = generate(*engine_, session, prompt, options, callbacks);
  EXPECT_EQ(interrupted.finish_reason, FinishReason::kInterrupted);
  EXPECT_EQ(whole.text.compare(0, interrupted.text.size(), interrupted.text), 0);
}

TEST_F(SessionTest, AMarkedPromptCountsAsOnePrefillAndStopsLikeOne) {
  const auto prompt = ids(kText);
  GenerateOptions options;
  options.sampling.temperature = 0;
  options.max_tokens = 3;
  options.mark_before_last = true;
  std::vector<std::pair<int64_t, int64_t>> seen;
  GenerateCallbacks callbacks;
  callbacks.on_prefill = [&](int64_t done, int64_t total) { seen.emplace_back(done, total); };
  Session session(*engine_);
  const GenerateResult result = generate(*engine_, session, prompt, options, callbacks);
  const int64_t size = std::ssize(prompt);
  EXPECT_EQ(result.prefill_tokens, size);
  EXPECT_GT(result.prefill_seconds, 0);
  ASSERT_GE(seen.size(), 3u);
  EXPECT_EQ(seen.front(), std::pair(int64_t{0}, size - 1));
  EXPECT_EQ(seen.back(), std::pair(size - 1, size));
  // The mark is there: another last token costs one.
  auto other = prompt;
  other.back() = 100;
  EXPECT_EQ(computed(session, other), 1);

  callbacks = {};
  int calls = 0;
  callbacks.keep_going = [&] { return ++calls < 2; };
  Session stopped(*engine_);
  const GenerateResult part = generate(*engine_, stopped, prompt, options, callbacks);
  EXPECT_EQ(part.finish_reason, FinishReason::kInterrupted);
  EXPECT_EQ(part.prefill_tokens, 32);  // one chunk
  EXPECT_TRUE(part.ids.empty());
}

TEST_F(SessionTest, ACallersErrorsAreBadInputAndChangeNothing) {
  const auto all = ids(kText);
  Session session(*engine_);
  session.sync(all);
  const auto expect_refused = [&](std::string_view part, const auto& call) {
    try {
      call();
      ADD_FAILURE() << "not refused: " << part;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kBadInput) << error.what();
      EXPECT_NE(std::string_view(error.what()).find(part), std::string_view::npos) << error.what();
      EXPECT_EQ(std::string_view(error.what()).find(".cpp"), std::string_view::npos) << error.what();
    }
    EXPECT_EQ(session.tokens(), all);
  };
  const auto vocab = static_cast<TokenId>(engine_->config().vocab_size);
  std::vector<TokenId> wrong(40, 5);  // shares no prefix, and the wrong id is in its second chunk
  wrong[0] = 6;
  wrong.back() = vocab;
  const std::vector<TokenId> endless(static_cast<size_t>(engine_->config().max_position) + 1, 5);
  expect_refused("no tokens", [&] { session.sync({}); });
  expect_refused("vocabulary", [&] { session.sync(wrong); });
  expect_refused("vocabulary", [&] { session.append(vocab); });
  expect_refused("vocabulary", [&] { session.append(-1); });
  expect_refused("max_position_embeddings", [&] { session.sync(endless); });
  expect_refused("max_position_embeddings", [&] { generate(*engine_, session, endless, {}); });
}

TEST_F(SessionTest, PerplexityScoresTheNextTokenOfEachColdWindow) {
  const auto all = ids(kText);
  constexpr int64_t kCtx = 10;
  const PerplexityResult result = evaluate_perplexity(*engine_, all, kCtx, 2);
  EXPECT_EQ(result.num_windows, 2);
  EXPECT_EQ(result.num_scored, 2 * kCtx);
  double nats = 0;
  for (int64_t window = 0; window < 2; ++window)
    for (int64_t t = 0; t < kCtx; ++t) {
      const auto logits = fresh_logits({all.begin() + window * kCtx, all.begin() + window * kCtx + t + 1});
      double sum = 0;
      for (float x : logits) sum += std::exp(static_cast<double>(x));
      nats += std::log(sum) - logits[static_cast<size_t>(all[static_cast<size_t>(window * kCtx + t + 1)])];
    }
  EXPECT_NEAR(result.nats, nats, 1e-3);
  EXPECT_THROW(evaluate_perplexity(*engine_, std::span(all).first(10), 10, 0), Error);
  EXPECT_THROW(evaluate_perplexity(*engine_, all, 0, 0), Error);

  const PerplexityResult stopped =
      evaluate_perplexity(*engine_, all, kCtx, 0, [](int64_t done, int64_t) { return done < kCtx; });
  EXPECT_EQ(stopped.num_windows, 1);
  EXPECT_EQ(stopped.num_scored, kCtx);
  EXPECT_GT(stopped.seconds, 0);
}

TEST_F(SessionTest, UnknownFolderAndForcedMissingIsaAreNamed) { EXPECT_THROW(Engine::open("/nonexistent", {}), Error); }

}  // namespace
}  // namespace dsv4
