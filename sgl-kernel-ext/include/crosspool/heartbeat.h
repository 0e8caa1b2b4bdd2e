// How the resident loop of a CPU tells that it goes on: memory that the launcher looks at, laid out
// as crosspool.transport.heartbeats has it. Whoever writes a line is the only one; anybody reads.
#ifndef CROSSPOOL_HEARTBEAT_H
#define CROSSPOOL_HEARTBEAT_H

#include <cstdint>

#include "atomic.h"

namespace crosspool {

// What a loop does.
enum class Activity : std::uint32_t {
  kIdle = 0,       // nothing to do, or waits for its host
  kComputing = 1,  // some of its threads count
  kWaiting = 2,    // waits for other devices' replies alone
  kReading = 3,    // waits for weights that are being read
};

// A number that a thread of the loop counts up while it computes, in a line of memory of its own.
struct alignas(64) ThreadHeartbeat {
  std::uint64_t advances;
};

// Followed by a ThreadHeartbeat for each thread.
struct alignas(64) LoopHeartbeat {
  std::uint32_t activity;
  std::uint32_t looks;  // how often the loop has looked for work and found none; wraps around

  void count_look() {
    const Atomic<std::uint32_t> atomic(looks);
    atomic.store(atomic.load(kRelaxed) + 1, kRelaxed);
  }

  void set(Activity value) {
    Atomic<std::uint32_t>(activity).store(static_cast<std::uint32_t>(value), kRelaxed);
  }
  std::uint64_t* advances(int thread) {
    return &reinterpret_cast<ThreadHeartbeat*>(this + 1)[thread].advances;
  }
};

}  // namespace crosspool

#endif
