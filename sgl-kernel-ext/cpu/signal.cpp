#include <crosspool/signal.h>

#include <atomic>
#include <cstdint>

#include "wait.h"

using crosspool::Futex;
using crosspool::now_ns;

static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic_ref<std::uint32_t>::is_always_lock_free);

std::uint64_t crosspool_signal_load(std::uint64_t* signal) {
  return std::atomic_ref(*signal).load(std::memory_order_acquire);
}

void crosspool_signal_store(std::uint64_t* signal, std::uint64_t value) {
  std::atomic_ref(*signal).store(value, std::memory_order_release);
}

std::uint32_t crosspool_doorbell_rings(crosspool_doorbell* doorbell) {
  return std::atomic_ref(doorbell->rings).load(std::memory_order_acquire);
}

void crosspool_doorbell_ring(crosspool_doorbell* doorbell) {
  // The ringer counts, then looks for sleepers; a sleeper announces itself, then looks at the count
  // (in the kernel). In one total order of these four, at least one sees the other.
  std::atomic_ref(doorbell->rings).fetch_add(1, std::memory_order_seq_cst);
  if (std::atomic_ref(doorbell->sleepers).load(std::memory_order_seq_cst) != 0) {
    crosspool::futex_wake_all(Futex::kShared, &doorbell->rings);
  }
}

std::uint32_t crosspool_doorbell_wait(crosspool_doorbell* doorbell, std::uint32_t seen,
                                      std::int64_t spin_ns, std::int64_t timeout_ns) {
  std::uint32_t rings = crosspool_doorbell_rings(doorbell);
  if (rings != seen || timeout_ns <= 0) return rings;
  const std::int64_t start = now_ns();
  std::int64_t spent = 0;
  while (spent < spin_ns && spent < timeout_ns) {
    for (int look = 0; look < crosspool::kLooksPerClock; ++look) {
      crosspool::relax();
      rings = crosspool_doorbell_rings(doorbell);
      if (rings != seen) return rings;
    }
    spent = now_ns() - start;
  }
  if (spent >= timeout_ns) return rings;
  std::atomic_ref sleepers(doorbell->sleepers);
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  // A wake may belong to an earlier ring, which was counted in `seen` already; then the wait goes
  // on.
  bool woken = true;
  while (woken && spent < timeout_ns) {
    woken = crosspool::futex_wait(Futex::kShared, &doorbell->rings, seen, timeout_ns - spent);
    rings = crosspool_doorbell_rings(doorbell);
    if (rings != seen) break;
    spent = now_ns() - start;
  }
  sleepers.fetch_sub(1, std::memory_order_seq_cst);
  return rings;
}
