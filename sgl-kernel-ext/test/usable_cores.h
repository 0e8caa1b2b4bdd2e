// The cores on which this process may run.
#ifndef CROSSPOOL_TEST_USABLE_CORES_H
#define CROSSPOOL_TEST_USABLE_CORES_H

#include <sched.h>

#include <cstdint>
#include <vector>

inline std::vector<std::int32_t> usable_cores() {
  cpu_set_t set;
  sched_getaffinity(0, sizeof(set), &set);
  std::vector<std::int32_t> found;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(static_cast<unsigned>(core), &set)) found.push_back(core);
  }
  return found;
}

#endif
