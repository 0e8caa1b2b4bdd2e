// Lanes of one device that launch stages one at a time: first come, first served.
#ifndef CROSSPOOL_CUDA_TURN_H
#define CROSSPOOL_CUDA_TURN_H

#include <crosspool/atomic.h>

#include <cstdint>

namespace crosspool::gpu {

// In device memory, all zero at first.
struct alignas(64) Turn {
  std::uint64_t next;
  std::uint64_t serving;
};

// A lane's place in the queue.
class Ticket {
 public:
  // Whether the lane has its turn; it is asked again until then. A null turn is always had.
  CROSSPOOL_INLINE bool take(Turn* turn) {
    if (turn == nullptr) return true;
    if (!drawn_) number_ = Atomic<std::uint64_t>(turn->next).fetch_add(1, kRelaxed);
    drawn_ = true;
    return Atomic<std::uint64_t>(turn->serving).load(kAcquire) == number_;
  }

  // Ends the turn. A lane that gave up waiting never had it: the lanes behind it then wait for
  // their bound, since the one that holds the turn is stuck.
  CROSSPOOL_INLINE void give(Turn* turn) {
    if (!drawn_) return;
    drawn_ = false;
    Atomic<std::uint64_t> serving(turn->serving);
    if (serving.load(kRelaxed) == number_) serving.store(number_ + 1, kRelease);
  }

  CROSSPOOL_INLINE bool drawn() const { return drawn_; }

 private:
  std::uint64_t number_ = 0;
  bool drawn_ = false;
};

}  // namespace crosspool::gpu

#endif
