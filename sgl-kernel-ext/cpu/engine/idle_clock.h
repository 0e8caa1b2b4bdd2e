// Since when a loop has run no steps. The loop tells; whoever works beside it looks, from any
// thread.
#ifndef CROSSPOOL_CPU_ENGINE_IDLE_CLOCK_H
#define CROSSPOOL_CPU_ENGINE_IDLE_CLOCK_H

#include <atomic>
#include <cstdint>
#include <limits>

#include "../wait.h"

namespace crosspool {

class IdleClock {
 public:
  // For the loop's thread alone.
  void work() { since_.store(kWorking, std::memory_order_relaxed); }
  void rest() {
    if (since_.load(std::memory_order_relaxed) == kWorking) {
      since_.store(now_ns(), std::memory_order_relaxed);
    }
  }

  // How long nothing has run, in ns; negative while something does.
  std::int64_t ns() const { return now_ns() - since_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::int64_t kWorking = std::numeric_limits<std::int64_t>::max();

  std::atomic<std::int64_t> since_{0};
};

}  // namespace crosspool

#endif
