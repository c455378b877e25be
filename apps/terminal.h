// Progress on stderr (a bar only on a terminal) and Ctrl-C.
#pragma once

#include <cstdint>
#include <string>

namespace dsv4::app {

// Redraws one line at most ten times a second while stderr is a terminal and quiet is false; otherwise does nothing.
class ProgressLine {
 public:
  explicit ProgressLine(bool quiet);
  ~ProgressLine();
  void update(const std::string& text, bool force = false);
  void finish();

 private:
  bool enabled_;
  bool drawn_ = false;
  int64_t last_draw_us_ = 0;
};

// First Ctrl-C sets the flag, a second one ends the process with 130.
void install_interrupt_handler();
bool interrupted();
void clear_interrupt();  // after it was dealt with

}  // namespace dsv4::app
