// The lane events of a loop, in a ring. One thread writes it; another stops the recording, then
// reads.
#ifndef CROSSPOOL_CPU_ENGINE_TRACE_H
#define CROSSPOOL_CPU_ENGINE_TRACE_H

#include <atomic>
#include <cstdint>
#include <vector>

namespace crosspool {

enum class TracedPart : std::int32_t { kAttention = 0, kFFN = 1, kHead = 2 };

// crosspool.observability.trace.LaneEvent says what the fields mean.
struct TraceEvent {
  std::int64_t start_ns;
  std::int64_t end_ns;
  std::int64_t step;
  std::int32_t attention_rank;
  std::int32_t lane;
  std::int32_t model;
  std::int32_t layer;
  TracedPart part;
  std::int32_t rows;
};

class Trace {
 public:
  static constexpr std::uint64_t kCapacity = 1 << 16;

  Trace() : events_(kCapacity) {}

  bool on() const { return on_.load(std::memory_order_relaxed); }

  // The writer's.
  void record(const TraceEvent& event) {
    const std::uint64_t next = written_.load(std::memory_order_relaxed);
    events_[next % kCapacity] = event;
    written_.store(next + 1, std::memory_order_release);
  }

  // The reader's. Events before start() are forgotten.
  void start() {
    first_ = written_.load(std::memory_order_acquire);
    on_.store(true, std::memory_order_relaxed);
  }
  void stop() { on_.store(false, std::memory_order_relaxed); }
  // Copies the events since start(), oldest first, and returns their number: at most `room`, and
  // never the slot that the writer may be writing.
  std::uint64_t read(TraceEvent* into, std::uint64_t room) {
    const std::uint64_t end = written_.load(std::memory_order_acquire);
    std::uint64_t begin = first_;
    if (end - begin >= kCapacity) begin = end - kCapacity + 1;
    if (end - begin > room) begin = end - room;
    for (std::uint64_t i = begin; i < end; ++i) *into++ = events_[i % kCapacity];
    first_ = end;
    return end - begin;
  }

 private:
  std::atomic<bool> on_{false};
  std::atomic<std::uint64_t> written_{0};
  std::uint64_t first_ = 0;
  std::vector<TraceEvent> events_;
};

}  // namespace crosspool

#endif
