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
  try {
    dsv4::LanguageModel::open("/nonexistent");
  } catch (const std::runtime_error&) {
    return 0;
  }
  return 1;
}
