// How a step's attention is cut into tasks, once per step: the same for all its layers.
#ifndef CROSSPOOL_CPU_KERNELS_ATTENTION_PLAN_H
#define CROSSPOOL_CPU_KERNELS_ATTENTION_PLAN_H

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace crosspool {

inline constexpr std::int32_t kAttentionQueries = 96;  // rows x heads of a task at most
inline constexpr std::int32_t kKeyRange = 256;         // keys; ranges begin at multiples

class AttentionPlan {
 public:
  // Plans `count` segments for a team of `threads`. The cut into tasks changes no result. Memory
  // grows to the need of the largest batch and is kept.
  void make(const AttentionShape& shape, const Segment* segments, std::int32_t count,
            std::int32_t threads);

  // One thread's tasks. All threads' tasks cost about the same.
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

// The face for Python; the engine uses the class.
extern "C" {
CROSSPOOL_API crosspool::AttentionPlan* crosspool_attention_plan(
    const crosspool::AttentionShape* shape, const crosspool::Segment* segments, std::int32_t count,
    std::int32_t threads);
// Returns one thread's tasks and their number; partials and arrivals are the whole plan's.
CROSSPOOL_API const crosspool::AttentionTask* crosspool_attention_plan_tasks(
    crosspool::AttentionPlan* plan, std::int32_t thread, std::int32_t* count, float** partials,
    std::uint32_t** arrivals);
CROSSPOOL_API void crosspool_attention_plan_free(crosspool::AttentionPlan* plan);
}

#endif
