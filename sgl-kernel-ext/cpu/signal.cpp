#include <crosspool/signal.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace {

static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic_ref<std::uint32_t>::is_always_lock_free);

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr int kLooksPerClock = 32;

std::int64_t now_ns() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * kSecond + time.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#else
#error "CrossPool's native code knows x86-64 and aarch64"
#endif
}

// Shared between processes, hence without FUTEX_PRIVATE_FLAG. False: time is up, the word has
// changed, or a signal came for this thread; true: somebody called wake.
bool futex_wait(std::uint32_t* word, std::uint32_t expected, std::int64_t timeout_ns) {
  const timespec timeout{.tv_sec = timeout_ns / kSecond, .tv_nsec = timeout_ns % kSecond};
  return syscall(SYS_futex, word, FUTEX_WAIT, expected, &timeout, nullptr, 0) == 0;
}

void futex_wake_all(std::uint32_t* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

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
    futex_wake_all(&doorbell->rings);
  }
}

std::uint32_t crosspool_doorbell_wait(crosspool_doorbell* doorbell, std::uint32_t seen,
                                      std::int64_t spin_ns, std::int64_t timeout_ns) {
  std::uint32_t rings = crosspool_doorbell_rings(doorbell);
  if (rings != seen || timeout_ns <= 0) return rings;
  const std::int64_t start = now_ns();
  std::int64_t spent = 0;
  while (spent < spin_ns && spent < timeout_ns) {
    for (int look = 0; look < kLooksPerClock; ++look) {
      relax();
      rings = crosspool_doorbell_rings(doorbell);
      if (rings != seen) return rings;
    }
    spent = now_ns() - start;
  }
  if (spent >= timeout_ns) return rings;
  std::atomic_ref sleepers(doorbell->sleepers);
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  // The wake of an earlier ring, which its ringer counted before it looked for sleepers, may come
  // only now: that is no news.
  bool woken = true;
  while (woken && spent < timeout_ns) {
    woken = futex_wait(&doorbell->rings, seen, timeout_ns - spent);
    rings = crosspool_doorbell_rings(doorbell);
    if (rings != seen) break;
    spent = now_ns() - start;
  }
  sleepers.fetch_sub(1, std::memory_order_seq_cst);
  return rings;
}
