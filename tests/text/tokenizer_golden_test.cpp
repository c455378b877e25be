// The demo tokenizer against ids made by independent implementations (tests/golden/text/README.md).
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "base/file.h"
#include "base/json.h"
#include "text/tokenizer.h"
#include "tiny_tokenizer.h"

namespace dsv4::test {
namespace {

const std::string kGolden = DSV4_SOURCE_DIR "/tests/golden/text/";
const std::string kShared = DSV4_SOURCE_DIR "/../shared/";

// The bundled model's file; the checkpoint it was made from has the same one.
std::string demo_tokenizer_path() {
  const std::string bundled = DSV4_SOURCE_DIR "/models/demo/tokenizer.json";
  return std::filesystem::exists(bundled) ? bundled : kShared + "demo-model/tokenizer.json";
}

#define DSV4_NEEDS(path) \
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there"

TEST(TokenizerGolden, HeldOutTextBeginsWithTheGoldenIds) {
  DSV4_NEEDS(demo_tokenizer_path());
  const Tokenizer tokenizer = Tokenizer::load(demo_tokenizer_path());
  const Json golden = read_json_file(kGolden + "heldout_head.json");
  const auto ids = tokenizer.encode(kBos + golden["text"].get<std::string>());
  const auto expected = golden["ids"].get<std::vector<TokenId>>();
  ASSERT_GE(ids.size(), expected.size());
  EXPECT_EQ(std::vector<TokenId>(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(expected.size())), expected);
}

TEST(TokenizerGolden, MixedUnicodeMatchesHuggingFaceTokenizers) {
  DSV4_NEEDS(demo_tokenizer_path());
  const Tokenizer tokenizer = Tokenizer::load(demo_tokenizer_path());
  const Json cases = read_json_file(kGolden + "hugging_face_cases.json");
  ASSERT_GT(cases.size(), 50u);
  for (const Json& c : cases) {
    const auto text = c["text"].get<std::string>();
    EXPECT_EQ(tokenizer.encode(text), c["ids"].get<std::vector<TokenId>>()) << text;
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
}

TEST(TokenizerGolden, WholeHeldOutTextMatchesTheFirst4096GoldenIdsAndRoundTrips) {
  const std::string safetensors_path = kShared + "golden/demo-quantised.safetensors";
  DSV4_NEEDS(safetensors_path);
  const Tokenizer tokenizer = Tokenizer::load(kShared + "demo-model/tokenizer.json");
  const std::string text = read_text_file(kShared + "golden/heldout.txt", 1 << 20);

  // The one tensor wanted here, read by hand: this folder may not use the checkpoint library.
  const MappedFile file(safetensors_path);
  const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const Json tensor = parse_json(bytes.substr(8, header_bytes), safetensors_path)["heldout_ids_first4096"];
  ASSERT_EQ(tensor["dtype"], "I64");
  std::vector<int64_t> expected(4096);
  std::memcpy(expected.data(), bytes.data() + 8 + header_bytes + tensor["data_offsets"][0].get<uint64_t>(),
              4096 * sizeof(int64_t));

  const auto ids = tokenizer.encode(kBos + text);
  ASSERT_GE(ids.size(), expected.size());
  EXPECT_EQ(std::vector<int64_t>(ids.begin(), ids.begin() + 4096), expected);
  EXPECT_EQ(tokenizer.decode(ids, true), text);
  EXPECT_EQ(tokenizer.vocab_size(), 4096);
}

}  // namespace
}  // namespace dsv4::test
