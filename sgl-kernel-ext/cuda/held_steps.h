// Steps that a lane has taken from its command ring and not begun yet, in order.
#ifndef CROSSPOOL_CUDA_HELD_STEPS_H
#define CROSSPOOL_CUDA_HELD_STEPS_H

#include <crosspool/atomic.h>

#include "loop.h"

namespace crosspool::gpu {

struct HeldStep {
  std::uint64_t step;
  std::uint64_t arguments;  // address of a GPUStepArguments
  bool recalled;
};

class HeldSteps {
 public:
  CROSSPOOL_INLINE bool empty() const { return count_ == 0; }
  CROSSPOOL_INLINE bool full() const { return count_ == kMaxHeld; }

  // Requires !full().
  CROSSPOOL_INLINE void push(std::uint64_t step, std::uint64_t arguments) {
    at(count_++) = {step, arguments, false};
  }

  CROSSPOOL_INLINE void recall(std::uint64_t step) {
    for (std::uint32_t i = 0; i < count_; ++i)
      at(i).recalled = at(i).recalled || at(i).step == step;
  }

  // Requires !empty().
  CROSSPOOL_INLINE HeldStep pop() {
    const HeldStep held = at(0);
    first_ = (first_ + 1) % kMaxHeld;
    --count_;
    return held;
  }

 private:
  CROSSPOOL_INLINE HeldStep& at(std::uint32_t i) { return steps_[(first_ + i) % kMaxHeld]; }

  HeldStep steps_[kMaxHeld]{};
  std::uint32_t first_ = 0;
  std::uint32_t count_ = 0;
};

}  // namespace crosspool::gpu

#endif
