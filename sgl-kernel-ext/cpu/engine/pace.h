// How much of a core a thread takes that works beside a loop.
#ifndef CROSSPOOL_CPU_ENGINE_PACE_H
#define CROSSPOOL_CPU_ENGINE_PACE_H

#include <time.h>

#include <algorithm>
#include <cstdint>

#include "../wait.h"
#include "idle_clock.h"

namespace crosspool {

// While steps run, the thread rests as long as it computes: it takes caches and memory bandwidth
// from the steps, and its core from those who bring their tokens to users. Waiting for the storage
// is rest, too. While no step runs, it has nobody to yield to.
class Pace {
 public:
  // How long no step has run when none is thought to follow. Decoding pauses for less.
  static constexpr std::int64_t kQuietNs = 20'000'000;

  // For the thread that makes it.
  explicit Pace(const IdleClock& idle) : idle_(idle), cpu_ns_(cpu_ns()), ns_(now_ns()) {}

  bool quiet() const { return idle_.ns() >= kQuietNs; }

  // To be called between pieces of work.
  void rest() {
    const std::int64_t cpu = cpu_ns(), now = now_ns();
    owed_ns_ = std::max<std::int64_t>(0, owed_ns_ + 2 * (cpu - cpu_ns_) - (now - ns_));
    cpu_ns_ = cpu;
    ns_ = now;
    if (quiet()) owed_ns_ = 0;
    if (owed_ns_ < kLeastNs) return;
    const timespec time{.tv_sec = owed_ns_ / kSecond, .tv_nsec = owed_ns_ % kSecond};
    nanosleep(&time, nullptr);
  }

 private:
  static constexpr std::int64_t kLeastNs = 100'000;

  static std::int64_t cpu_ns() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec * kSecond + time.tv_nsec;
  }

  const IdleClock& idle_;
  std::int64_t cpu_ns_;
  std::int64_t ns_;
  std::int64_t owed_ns_ = 0;
};

}  // namespace crosspool

#endif
