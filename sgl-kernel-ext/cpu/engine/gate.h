// A number that threads of a team wait for. They spin for a while, then sleep.
#ifndef CROSSPOOL_CPU_ENGINE_GATE_H
#define CROSSPOOL_CPU_ENGINE_GATE_H

#include <atomic>
#include <cstdint>

#include "../wait.h"

namespace crosspool {

class alignas(64) Gate {
 public:
  // Publishes everything written before.
  void set(std::uint32_t value) {
    // As with a doorbell: the setter stores, then looks for sleepers; a sleeper announces itself,
    // then looks at the value (in the kernel). In one total order, at least one sees the other.
    value_.store(value, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) {
      futex_wake_all(Futex::kPrivate, &value_);
    }
  }

  // Returns when the gate stands at `value`. Spins for at most `patience` ns, which may change
  // meanwhile.
  void wait(std::uint32_t value, const std::atomic<std::int64_t>& patience) {
    for (int look = 0; look < kLooksPerClock; ++look) {
      if (value_.load(std::memory_order_acquire) == value) return;
      relax();
    }
    const std::int64_t start = now_ns();
    while (now_ns() - start < patience.load(std::memory_order_relaxed)) {
      for (int look = 0; look < kLooksPerClock; ++look) {
        if (value_.load(std::memory_order_acquire) == value) return;
        relax();
      }
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    for (;;) {
      const std::uint32_t found = value_.load(std::memory_order_seq_cst);
      if (found == value) break;
      futex_wait(Futex::kPrivate, &value_, found, -1);
    }
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  std::atomic<std::uint32_t> value_{0};
  std::atomic<std::uint32_t> sleepers_{0};
  static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t));
};

}  // namespace crosspool

#endif
