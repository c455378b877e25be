// Peak of one instruction: twelve independent chains, timed for about 20 ms, best of five. Included per instruction set.
//
// V: vector type with kChains live registers; step(v) applies the instruction once. ops: operations per step.

template <class V, class Step>
double measure_peak(V (&chains)[12], double ops_per_step, Step step) {
  constexpr int kInner = 20000;
  double best = 0.0;
  for (int pass = 0; pass < 12; ++pass) {
    timespec begin{}, end{};
    clock_gettime(CLOCK_MONOTONIC, &begin);
    V c[12];
    for (int i = 0; i < 12; ++i) c[i] = chains[i];
    for (int n = 0; n < kInner; ++n) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) c[i] = step(c[i]);
      asm volatile("" : "+x"(c[0]), "+x"(c[1]), "+x"(c[2]), "+x"(c[3]), "+x"(c[4]), "+x"(c[5]));
      asm volatile("" : "+x"(c[6]), "+x"(c[7]), "+x"(c[8]), "+x"(c[9]), "+x"(c[10]), "+x"(c[11]));
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    for (int i = 0; i < 12; ++i) chains[i] = c[i];
    const double seconds =
        static_cast<double>(end.tv_sec - begin.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
    const double rate = ops_per_step * 12.0 * kInner / seconds;
    best = rate > best ? rate : best;
  }
  return best;
}
