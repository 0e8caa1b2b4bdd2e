// Who reads weights beside a loop, and how much of a core it takes.
#ifndef CROSSPOOL_CPU_ENGINE_PACE_H
#define CROSSPOOL_CPU_ENGINE_PACE_H

#include <time.h>

#include <algorithm>
#include <cstdint>

#include "../wait.h"
#include "loop.h"

namespace crosspool {

// While steps run, the thread that reads rests as long as it has computed: it takes memory
// bandwidth and caches from the steps, and its core from those who bring their tokens to users.
// Waiting for the storage is rest, too. When no steps run, it has nobody to yield to.
class Pace {
 public:
  // How long no step has run when none is thought to run soon. Decoding pauses for less.
  static constexpr std::int64_t kQuietNs = 20'000'000;

  explicit Pace(const Loop& loop) : loop_(loop), last_cpu_ns_(cpu_ns()), last_ns_(now_ns()) {}

  bool quiet() const { return loop_.idle_ns() >= kQuietNs; }

  // To be called between pieces of work.
  void rest() {
    const std::int64_t cpu = cpu_ns(), now = now_ns(), computed = cpu - last_cpu_ns_;
    owed_ns_ = std::max<std::int64_t>(0, owed_ns_ + 2 * computed - (now - last_ns_));
    last_cpu_ns_ = cpu;
    last_ns_ = now;
    if (quiet()) owed_ns_ = 0;
    if (owed_ns_ < kLeastNs) return;
    const timespec time{.tv_sec = 0, .tv_nsec = std::min(owed_ns_, kSecond - 1)};
    nanosleep(&time, nullptr);
  }

 private:
  static constexpr std::int64_t kLeastNs = 200'000;

  static std::int64_t cpu_ns() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec * kSecond + time.tv_nsec;
  }

  const Loop& loop_;
  std::int64_t last_cpu_ns_;
  std::int64_t last_ns_;
  std::int64_t owed_ns_ = 0;
};

}  // namespace crosspool

#endif
