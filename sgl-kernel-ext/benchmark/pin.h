#ifndef CROSSPOOL_BENCHMARK_PIN_H
#define CROSSPOOL_BENCHMARK_PIN_H

#include <sched.h>

#include <cstdio>
#include <cstdlib>

namespace crosspool::benchmark {

// Keeps the calling thread on a core; ends the program where it cannot.
inline void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  if (sched_setaffinity(0, sizeof(set), &set) == 0) return;
  std::fprintf(stderr, "core %d is not available\n", core);
  std::exit(2);
}

}  // namespace crosspool::benchmark

#endif
