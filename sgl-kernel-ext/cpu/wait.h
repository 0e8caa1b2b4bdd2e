// The means of waiting: the clock, the pause of a spinning thread, futexes.
#ifndef CROSSPOOL_CPU_WAIT_H
#define CROSSPOOL_CPU_WAIT_H

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstdint>

namespace crosspool {

inline constexpr std::int64_t kSecond = 1'000'000'000;
inline constexpr int kLooksPerClock = 32;

inline std::int64_t now_ns() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * kSecond + time.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#else
#error "CrossPool's native code knows x86-64 and aarch64"
#endif
}

// Whether processes share a futex's word, or threads of one process.
enum class Futex : int { kShared = 0, kPrivate = FUTEX_PRIVATE_FLAG };

// Returns true when woken; false when time is up, the word has changed, or a signal came for this
// thread. A negative timeout means none.
inline bool futex_wait(Futex kind, void* word, std::uint32_t expected, std::int64_t timeout_ns) {
  const timespec timeout{.tv_sec = timeout_ns / kSecond, .tv_nsec = timeout_ns % kSecond};
  return syscall(SYS_futex, word, FUTEX_WAIT | static_cast<int>(kind), expected,
                 timeout_ns < 0 ? nullptr : &timeout, nullptr, 0) == 0;
}

inline void futex_wake_all(Futex kind, void* word) {
  syscall(SYS_futex, word, FUTEX_WAKE | static_cast<int>(kind), INT_MAX, nullptr, nullptr, 0);
}

}  // namespace crosspool

#endif
