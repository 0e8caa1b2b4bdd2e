// The host's side of a GPU's resident loop.
#ifndef CROSSPOOL_CUDA_RESIDENT_H
#define CROSSPOOL_CUDA_RESIDENT_H

#include <cstdint>
#include <memory>
#include <vector>

#include "calls.h"
#include "graph_table.h"
#include "lane.h"
#include "loop.h"
#include "memory.h"

namespace crosspool::gpu {

// Methods throw std::runtime_error.
class GPULoop {
 public:
  explicit GPULoop(const GPULoopDescription& description);
  ~GPULoop();
  GPULoop(GPULoop&&) = delete;
  GPULoop& operator=(GPULoop&&) = delete;

  void add_graph(std::uint32_t lane, std::uint32_t model, std::uint32_t stage, std::uint32_t bucket,
                 Graph graph);
  void start();
  void quiesce(std::int64_t timeout_ns);
  bool resident() const;
  // Finds the streams that make no progress within the bound, for a resident loop: those of lanes
  // that have not yet run, and `beside`, in which the host works. Writes 0 or 1 for each lane, and
  // then for `beside`. Returns their number.
  std::uint32_t probe(Stream beside, std::int64_t timeout_ns, std::uint8_t* stuck);

  bool push_step(std::uint32_t lane, const GPUStepArguments& arguments);
  bool push(std::uint32_t lane, const Command& command);
  bool pop(Event* event);
  bool wait(std::int64_t timeout_ns);
  LaneStatus status(std::uint32_t lane) const;

  void trace_start();
  std::uint32_t trace_stop(TracedStage* stages, std::uint32_t room);

 private:
  // Memory of a lane that host and device both see.
  struct Mapped {
    CommandRing commands;
    EventRing events;
    LaneStatus status;
    GPUStepArguments arguments[kMaxHeld];
    LaneTrace trace;
  };

  struct HostLane {
    Stream stream = nullptr;
    Exec scheduler = nullptr;
    bool resident = false;
    std::uint64_t before = 0;  // heartbeat at the start
    bool asked_to_leave = false;
    std::uint64_t pushed = 0;  // steps
    std::uint64_t done = 0;
    std::uint64_t heartbeat = 0;  // the last one seen, and when it was seen to change
    std::int64_t heard_ns = 0;
    std::uint64_t traced_from = 0;  // stages recorded before this trace, or handed over
  };

  void describe_models(const GPULoopDescription& description);
  void make_lanes(const GPULoopDescription& description);
  void destroy();
  static void set_resident(HostLane& lane, bool resident);
  const HostLane& at(std::uint32_t lane) const;
  HostLane& at(std::uint32_t lane);
  void not_resident(const char* what) const;
  bool has_event() const;
  void look_after(std::int64_t now);
  void push_trace(bool on);
  void compare_clocks();
  [[noreturn]] void report(std::uint32_t lane) const;

  std::uint32_t lane_count_;
  std::uint64_t wait_ns_;
  std::vector<std::vector<std::uint8_t>> kinds_;
  std::vector<DeviceArray<std::uint8_t>> device_kinds_;
  std::vector<ModelEntry> models_;
  std::vector<std::uint32_t> bucket_rows_;
  std::vector<GPULane> images_;  // the lanes as they begin
  DeviceArray<ModelEntry> device_models_;
  DeviceArray<std::uint32_t> device_bucket_rows_;
  DeviceArray<GPULane> lanes_;
  MappedArray<Mapped> mapped_;
  DeviceArray<std::uint64_t> probed_;
  GraphTable graphs_;
  std::vector<HostLane> host_;
  std::uint32_t next_lane_ = 0;  // pop() looks there first
  bool tracing_ = false;
  // How far the host's clock is ahead of the device's: the least that was seen in a trace.
  std::int64_t ahead_ns_ = 0;
};

}  // namespace crosspool::gpu

#endif
