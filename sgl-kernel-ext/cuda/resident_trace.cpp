// The trace of a resident loop: lanes record, the host collects.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "clock.h"
#include "description.h"
#include "resident.h"

namespace crosspool::gpu {

void GPULoop::trace_start() {
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    host_[i].traced_from = Atomic<std::uint64_t>(mapped_[i].trace.written).load(kAcquire);
  }
  push_trace(true);
  tracing_ = true;
  ahead_ns_ = std::numeric_limits<std::int64_t>::max();
  compare_clocks();
}

std::uint32_t GPULoop::trace_stop(TracedStage* stages, std::uint32_t room) {
  compare_clocks();
  tracing_ = false;
  push_trace(false);
  std::vector<TracedStage> found;
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    LaneTrace& trace = mapped_[i].trace;
    Atomic<std::uint64_t> written(trace.written);
    const std::uint64_t end = written.load(kAcquire), from = host_[i].traced_from;
    const std::uint64_t oldest = end - from > kTraceRoom ? end - kTraceRoom : from;
    const std::size_t before = found.size();
    for (std::uint64_t n = oldest; n < end; ++n) found.push_back(trace.stages[n % kTraceRoom]);
    // The lane may still record, and has begun to write one stage more than it has counted.
    const std::uint64_t lost = written.load(kAcquire) + 1;
    if (lost > oldest + kTraceRoom) {
      const std::uint64_t count = std::min(lost - oldest - kTraceRoom, end - oldest);
      const auto first = found.begin() + static_cast<std::ptrdiff_t>(before);
      found.erase(first, first + static_cast<std::ptrdiff_t>(count));
    }
    host_[i].traced_from = end;
  }
  std::sort(found.begin(), found.end(),
            [](const TracedStage& a, const TracedStage& b) { return a.end_ns < b.end_ns; });
  const std::size_t count = std::min<std::size_t>(found.size(), room);
  std::copy(found.end() - static_cast<std::ptrdiff_t>(count), found.end(), stages);
  for (std::size_t i = 0; i < count; ++i) {
    stages[i].start_ns += static_cast<std::uint64_t>(ahead_ns_);
    stages[i].end_ns += static_cast<std::uint64_t>(ahead_ns_);
  }
  return static_cast<std::uint32_t>(count);
}

void GPULoop::push_trace(bool on) {
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    if (!mapped_[i].commands.push({CommandKind::kTrace, i, 0, on ? 1U : 0U, 0})) {
      throw std::runtime_error("the command ring of " + lane_name(i) + " is full");
    }
  }
}

// The host sees the device's clock late, by a varying time, so the least difference that it sees is
// nearest to the true difference of the clocks.
void GPULoop::compare_clocks() {
  for (std::uint32_t i = 0; i < lane_count_; ++i) {
    const std::uint64_t device = status(i).clock_ns;
    if (device == 0) continue;
    ahead_ns_ = std::min(ahead_ns_, now_ns() - static_cast<std::int64_t>(device));
  }
}

}  // namespace crosspool::gpu
