#include "attention_plan.h"

#include <algorithm>

namespace crosspool {
namespace {

// A request whose rows of one KV head fit into one task is cut along its keys, into at most
// kMostSplits tasks of about a range or more (fewer keys are not worth a task).
constexpr std::int64_t kMostSplits = 64;
constexpr std::int32_t kKeyStep = 64;  // tasks begin at multiples: the kernel's blocks

// The cost of a task, in no particular unit. Reading and packing a key costs about as much as eight
// queries.
std::int64_t cost(const AttentionTask& task) {
  const std::int64_t heads = task.head_end - task.head_begin;
  const std::int64_t rows = task.row_end - task.row_begin;
  return (std::int64_t{task.key_end} - task.key_begin) * (8 + rows * heads);
}

std::int64_t splits_of(std::int64_t keys) {
  return std::clamp((keys + kKeyRange / 2) / kKeyRange, std::int64_t{1}, kMostSplits);
}

// The beginning of the block that has the first key that a row of a segment sees.
std::int32_t first_key(const AttentionShape& shape, const Segment& segment, std::int32_t row) {
  return shape.first_key(std::int64_t{segment.start} + row) / kKeyStep * kKeyStep;
}

}  // namespace

void AttentionPlan::make(const AttentionShape& shape, const Segment* segments, std::int32_t count,
                         std::int32_t threads) {
  tasks_.clear();
  std::int64_t partials = 0;
  std::int32_t arrivals = 0;
  const std::int32_t group = shape.q_heads / shape.kv_heads;
  const auto is_light = [&](const Segment& s) { return s.rows * group <= kAttentionQueries; };

  // Tasks of few rows take several KV heads, so that they read whole slots, as long as every thread
  // finds some tasks.
  std::int64_t ranges = 0;
  for (std::int32_t s = 0; s < count; ++s) {
    if (!is_light(segments[s])) continue;
    const std::int64_t end = std::int64_t{segments[s].start} + segments[s].rows;
    ranges += splits_of(end - first_key(shape, segments[s], 0));
  }
  const std::int64_t wanted = std::max<std::int64_t>(1, ranges * shape.kv_heads / (2 * threads));

  for (std::int32_t index = 0; index < count; ++index) {
    const Segment& segment = segments[index];
    AttentionTask task{};
    task.segment = index;
    task.splits = 1;
    if (is_light(segment)) {
      const std::int32_t begin = first_key(shape, segment, 0), end = segment.start + segment.rows;
      const std::int32_t first_range = begin / kKeyRange;
      task.ranges = (end + kKeyRange - 1) / kKeyRange - first_range;
      const std::int64_t splits = std::min<std::int64_t>(splits_of(end - begin), task.ranges);
      const auto heads = static_cast<std::int32_t>(
          std::min<std::int64_t>(wanted, kAttentionQueries / (segment.rows * group)) * group);
      task.splits = static_cast<std::int32_t>(splits);
      task.row_end = segment.rows;
      const std::int32_t first_arrival = arrivals;
      const std::int64_t first_partial = partials;
      for (std::int64_t split = 0; split < splits; ++split) {
        const auto range = [&](std::int64_t s) {
          return static_cast<std::int32_t>(task.ranges * s / splits);
        };
        task.range = range(split);
        task.key_begin = std::max(begin, (first_range + task.range) * kKeyRange);
        task.key_end = std::min(end, (first_range + range(split + 1)) * kKeyRange);
        arrivals = first_arrival;
        partials = first_partial;
        for (std::int32_t head = 0; head < shape.q_heads; head += heads) {
          task.head_begin = head;
          task.head_end = std::min(head + heads, shape.q_heads);
          task.arrival = arrivals;
          task.partial = partials;
          tasks_.push_back(task);
          if (splits == 1) continue;
          ++arrivals;
          partials +=
              std::int64_t{task.ranges} * (task.head_end - head) * segment.rows * (shape.v_dim + 2);
        }
      }
      continue;
    }
    const std::int32_t heads = std::min(group, kAttentionQueries);
    const std::int32_t rows = kAttentionQueries / heads;
    for (std::int32_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      for (std::int32_t head = 0; head < group; head += heads) {
        task.head_begin = kv_head * group + head;
        task.head_end = kv_head * group + std::min(head + heads, group);
        for (std::int32_t row = 0; row < segment.rows; row += rows) {
          task.row_begin = row;
          task.row_end = std::min(row + rows, segment.rows);
          task.key_begin = first_key(shape, segment, row);
          task.key_end = segment.start + task.row_end;
          tasks_.push_back(task);
        }
      }
    }
  }
  partials_.resize(std::max(partials_.size(), static_cast<std::size_t>(partials)));
  arrivals_.resize(std::max(arrivals_.size(), static_cast<std::size_t>(arrivals)));

  // Neighbours in memory stay with one thread. A task belongs to the share that holds its middle.
  std::int64_t total = 0;
  for (const AttentionTask& task : tasks_) total += cost(task);
  begins_.assign(static_cast<std::size_t>(threads) + 1, static_cast<std::int32_t>(tasks_.size()));
  std::int64_t done = 0;
  std::int32_t thread = 0;
  for (std::size_t i = 0; i < tasks_.size(); ++i) {
    const std::int64_t middle = done + cost(tasks_[i]) / 2;
    while (thread <= middle * threads / total) begins_[thread++] = static_cast<std::int32_t>(i);
    done += cost(tasks_[i]);
  }
}

const AttentionTask* AttentionPlan::tasks(std::int32_t thread) const {
  return tasks_.data() + begins_[thread];
}

std::int32_t AttentionPlan::task_count(std::int32_t thread) const {
  return begins_[thread + 1] - begins_[thread];
}

}  // namespace crosspool

crosspool::AttentionPlan* crosspool_attention_plan(const crosspool::AttentionShape* shape,
                                                   const crosspool::Segment* segments,
                                                   std::int32_t count, std::int32_t threads) {
  auto* const plan = new crosspool::AttentionPlan;
  plan->make(*shape, segments, count, threads);
  return plan;
}

const crosspool::AttentionTask* crosspool_attention_plan_tasks(crosspool::AttentionPlan* plan,
                                                               std::int32_t thread,
                                                               std::int32_t* count,
                                                               float** partials,
                                                               std::uint32_t** arrivals) {
  *count = plan->task_count(thread);
  *partials = plan->partials();
  *arrivals = plan->arrivals();
  return plan->tasks(thread);
}

void crosspool_attention_plan_free(crosspool::AttentionPlan* plan) { delete plan; }
