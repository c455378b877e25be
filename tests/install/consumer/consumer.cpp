// What a user of the installed library writes: generate, go back to a prefix, see errors as exceptions.
#include <dsv4/engine.h>
#include <dsv4/version.h>

#include <cstdio>
#include <stdexcept>

int main(int, char** argv) {
  dsv4::LanguageModel model = dsv4::LanguageModel::open(argv[1], {.exact = true, .num_threads = 1});
  dsv4::Timeline timeline(model);
  const dsv4::Completion first = timeline.generate("It was late", {.max_tokens = 8});
  const dsv4::Completion again = timeline.generate("It was late", {.max_tokens = 8});
  std::printf("dsv4 %d.%d: %s\n", DSV4_VERSION_MAJOR, DSV4_VERSION_MINOR, first.text.c_str());
  if (first.ids.size() != 8 || first.ids != again.ids) return 1;
  if (model.decode(model.encode("late")) != "late") return 1;
  int refused = 0;
  const auto expect_error = [&](const auto& call) {
    try {
      call();
    } catch (const std::runtime_error& error) {
      refused +=
          std::string(error.what()).find(".cpp") == std::string::npos;  // a caller's error, not a broken invariant
    }
  };
  expect_error([] { dsv4::LanguageModel::open("/nonexistent"); });
  expect_error([&] { dsv4::LanguageModel::open(argv[1], {.exact = true, .kv = "fp7"}); });
  expect_error([&] { timeline.sync({}); });
  expect_error([&] { timeline.append(static_cast<int32_t>(model.vocab_size())); });
  expect_error([&] { model.decode(std::vector<int32_t>{-1}); });
  return refused == 5 ? 0 : 1;
}
