// Which routed experts lie where in a pool's memory, and which of them go when another one comes.
#ifndef CROSSPOOL_CPU_ENGINE_EXPERT_MEMORY_H
#define CROSSPOOL_CPU_ENGINE_EXPERT_MEMORY_H

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace crosspool {

// Experts have numbers; that of a removed one is used again. An expert is worth the bytes that
// would be read if it went: its own, times how often it is used, where a use counts half after
// `half_life` ticks. Not for several threads at once.
class ExpertMemory {
 public:
  static constexpr std::int64_t kAbsent = -1;

  explicit ExpertMemory(std::int64_t bytes);

  std::int64_t bytes() const { return bytes_; }
  // Bytes of the experts that are present.
  std::int64_t taken() const { return taken_; }

  // A new expert, which is absent. Its size is a multiple of 64.
  std::int32_t add(std::int64_t bytes);
  // The expert must not be held.
  void remove(std::int32_t expert);

  void set_half_life(double ticks);
  void tick();
  void use(std::int32_t expert);

  // Held experts do not go. One that is absent may be held, too.
  void hold(std::int32_t expert) { ++experts_[expert].holds; }
  void release(std::int32_t expert) { --experts_[expert].holds; }

  // Gives an absent expert memory, and appends those that went to `gone`. Returns whether there was
  // enough that is not held.
  //
  // It is the first hole that is large enough. If there is none, those neighbours go that are worth
  // least together, the first of them among equals.
  bool place(std::int32_t expert, std::vector<std::int32_t>& gone);
  // Takes the memory of an expert that is present.
  void drop(std::int32_t expert);
  // Where it is, or kAbsent.
  std::int64_t offset(std::int32_t expert) const { return experts_[expert].offset; }
  // The experts that are present, in the order of their memory.
  const std::vector<std::int32_t>& present() const { return present_; }

 private:
  struct Expert {
    std::int64_t bytes = 0;
    std::int64_t offset = kAbsent;
    double uses = 0.0;  // in units of the first tick's
    std::int32_t holds = 0;
  };
  // Neighbours of `present_` [begin, end).
  struct Run {
    std::size_t begin;
    std::size_t end;
  };

  // Where the memory before `present_[index]` begins, and where it ends.
  std::int64_t begin_before(std::size_t index) const;
  std::int64_t end_before(std::size_t index) const;
  std::int64_t room(Run run) const { return end_before(run.end) - begin_before(run.begin); }
  double worth(Run run) const;
  std::optional<Run> hole(std::int64_t bytes) const;
  std::optional<Run> least(std::int64_t bytes) const;

  std::int64_t bytes_;
  std::int64_t taken_ = 0;
  double growth_ = 1.0;  // of the weight of a use from tick to tick
  double weight_ = 1.0;  // of a use now
  std::vector<Expert> experts_;
  std::vector<std::int32_t> free_;     // numbers
  std::vector<std::int32_t> present_;  // ascending by offset
};

}  // namespace crosspool

#endif
