// What an FFN part on its way needs of an expert pool.
#ifndef CROSSPOOL_CPU_ENGINE_EXPERT_NEED_H
#define CROSSPOOL_CPU_ENGINE_EXPERT_NEED_H

#include <atomic>
#include <cstdint>
#include <vector>

namespace crosspool {

// The experts of one FFN part, and which rows chose them. Each source of such parts has one. The
// loop's thread 0 writes it; the pool changes its state.
class ExpertNeed {
 public:
  enum class State : std::int32_t {
    kNone,     // no part is on its way, or its experts are not chosen yet
    kRunning,  // its experts are there, and stay
    kWaiting,  // some of them are being read
    kReady,    // all have been read, and stay; the part may run
    kFailed,   // one of them cannot be read
  };

  State state() const { return state_.load(std::memory_order_acquire); }
  // The model of the last part that asked for experts, by its number in the pool; -1 before.
  std::int32_t model() const { return model_; }

  // The choice of a part that waits.
  std::vector<std::int32_t> experts;  // [rows, top_k]
  std::vector<float> weights;
  std::vector<float> shared_weights;  // [rows]: of the shared expert, if it has a gate

 private:
  friend class ExpertPool;

  std::atomic<State> state_{State::kNone};
  std::int32_t model_ = -1;
  std::vector<std::int32_t> numbers_;  // of the experts
  bool holds_ = false;                 // whether they stay
  std::int64_t since_ns_ = 0;          // when it began to wait
};

}  // namespace crosspool

#endif
