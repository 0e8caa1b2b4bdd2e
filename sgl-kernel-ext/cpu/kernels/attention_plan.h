// How a step's attention is cut into tasks, once per step: the same for all its layers.
#ifndef CROSSPOOL_CPU_KERNELS_ATTENTION_PLAN_H
#define CROSSPOOL_CPU_KERNELS_ATTENTION_PLAN_H

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace crosspool {

class AttentionPlan {
 public:
  // Plans `count` segments for a team of `threads`. The cut into tasks depends on the segments
  // alone, so that results do not depend on the team; only their assignment depends on it. Memory
  // grows to what the largest batch needs and stays.
  void make(const AttentionShape& shape, const Segment* segments, std::int32_t count,
            std::int32_t threads);

  // The tasks of one thread, heaviest load balanced over the team.
  const AttentionTask* tasks(std::int32_t thread) const;
  std::int32_t task_count(std::int32_t thread) const;

  float* partials() { return partials_.data(); }
  std::uint32_t* arrivals() { return arrivals_.data(); }

 private:
  std::vector<AttentionTask> tasks_;
  std::vector<std::int32_t> begins_;  // [threads + 1]
  std::vector<float> partials_;
  std::vector<std::uint32_t> arrivals_;
};

}  // namespace crosspool

#endif
