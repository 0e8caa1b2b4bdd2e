// The host's clock.
#ifndef CROSSPOOL_CUDA_CLOCK_H
#define CROSSPOOL_CUDA_CLOCK_H

#include <time.h>

#include <cstdint>

namespace crosspool::gpu {

// CLOCK_MONOTONIC.
inline std::int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

}  // namespace crosspool::gpu

#endif
