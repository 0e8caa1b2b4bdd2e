// The C interface of libcrosspool_cuda.so, for crosspool/kernels/cuda_loop.py: the resident loop of
// one GPU. Functions that fail return null or a negative number, and crosspool_cuda_error() tells
// the calling thread why. One thread at a time uses a loop, with the loop's device as its current
// one.
#ifndef CROSSPOOL_CUDA_LOOP_H
#define CROSSPOOL_CUDA_LOOP_H

#include <crosspool/command_ring.h>
#include <crosspool/export.h>
#include <crosspool/lanes.h>

#include <cstdint>

#include "stages.h"

namespace crosspool::gpu {

inline constexpr std::uint32_t kMaxLinks = 8;  // links of a lane
inline constexpr std::uint32_t kMaxHeld = 8;   // steps of a lane, offered or taken

class GPULoop;

// A model, described in host memory.
struct ModelDescription {
  std::uint64_t layer_kinds;  // uint8 [layers], host memory
  std::uint32_t layers;
  std::uint32_t row_bytes;  // these three: ModelEntry
  std::uint32_t links;
  std::uint32_t local;
};

enum class Role : std::uint32_t {
  kAttention = 0,  // takes steps; its links lead to FFN ranks
  kFFN = 1,        // serves the dispatches that come through its links
};

struct LaneDescription {
  std::uint64_t words;   // device address of the StageWords
  std::uint64_t chosen;  // device address, int32 [rows of the largest bucket]: kHead writes
  std::uint64_t links;   // host address of LinkMemory [link_count], device addresses within
  std::uint32_t link_count;
  Role role;
};

struct GPULoopDescription {
  const ModelDescription* models;
  const LaneDescription* lanes;
  const std::uint32_t* bucket_rows;  // ascending
  std::uint32_t model_count;
  std::uint32_t lane_count;
  std::uint32_t bucket_count;
  std::uint32_t reserved;
  std::uint64_t epoch;    // incarnation of the attention rank
  std::uint64_t spin_ns;  // how long a pass polls before it launches the next; below wait_ns
  std::uint64_t wait_ns;  // bound of each wait for the host, and of a stage
};

}  // namespace crosspool::gpu

extern "C" {

CROSSPOOL_API const char* crosspool_cuda_error(void);

// sizeof of what Python mirrors, in the order of cuda_loop_structs.py; `count` of them at most.
// Returns their number.
CROSSPOOL_API std::int32_t crosspool_cuda_sizes(std::uint64_t* sizes, std::int32_t count);

// Makes a loop on the current device; it does not run yet. Creating and freeing a loop may wait for
// everything that runs on the device, so no other loop may be resident there.
CROSSPOOL_API crosspool::gpu::GPULoop* crosspool_cuda_loop_create(
    const crosspool::gpu::GPULoopDescription* description);
// Destroys the loop's graphs and memory. It and all others of the process must have left the device
// (quiesce).
CROSSPOOL_API std::int32_t crosspool_cuda_loop_free(crosspool::gpu::GPULoop* loop);

// Instantiates a captured graph (cudaGraph_t) for launches from the device, uploads it, and puts it
// into the table of a lane. The loop must not run. The caller keeps the captured graph and may
// destroy it at once; what its nodes point to must stay until the loop is freed.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_add_graph(crosspool::gpu::GPULoop* loop,
                                                         std::uint32_t lane, std::uint32_t model,
                                                         std::uint32_t stage, std::uint32_t bucket,
                                                         void* graph);
// Launches every lane's scheduler graph, for the first time or after quiesce.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_start(crosspool::gpu::GPULoop* loop);
// Writes which streams make no progress within `timeout_ns` while the loop is on the device, 0 or 1
// for each lane and then for `beside` (cudaStream_t), in which the host works: uint8 [lanes + 1].
// Returns their number.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_probe(crosspool::gpu::GPULoop* loop, void* beside,
                                                     std::int64_t timeout_ns, std::uint8_t* stuck);
// Asks every lane to leave the device between two steps, or where it waits (stages.h, Phase), and
// waits until all have. Steps stay where they are until the next start. Fails after `timeout_ns`;
// the lanes may still leave later.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_quiesce(crosspool::gpu::GPULoop* loop,
                                                       std::int64_t timeout_ns);

// The structure is copied. 0: the lane has kMaxHeld steps already.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_push_step(
    crosspool::gpu::GPULoop* loop, std::uint32_t lane,
    const crosspool::gpu::GPUStepArguments* arguments);
// kResume or kRecall. 0: the ring is full.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_push(crosspool::gpu::GPULoop* loop,
                                                    std::uint32_t lane,
                                                    const crosspool::Command* command);
// The next event of any lane, lanes in turn. 0: there is none.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_pop(crosspool::gpu::GPULoop* loop,
                                                   crosspool::Event* event);
// Waits until there is an event. 0: none came within `timeout_ns`.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_wait(crosspool::gpu::GPULoop* loop,
                                                    std::int64_t timeout_ns);
CROSSPOOL_API std::int32_t crosspool_cuda_loop_status(crosspool::gpu::GPULoop* loop,
                                                      std::uint32_t lane,
                                                      crosspool::gpu::LaneStatus* status);
// Makes lanes record their stages from now on; a lane that is in a step begins at its end. Fails
// when a command ring is full.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_trace_start(crosspool::gpu::GPULoop* loop);
// Ends the recording. Returns how many stages it has written: the latest of all lanes, at most
// kTraceRoom of each and `room` in all, in the order of their ends. Times are ns of the host's
// CLOCK_MONOTONIC, exact to microseconds as far as the host can tell.
CROSSPOOL_API std::int32_t crosspool_cuda_loop_trace_stop(crosspool::gpu::GPULoop* loop,
                                                          crosspool::gpu::TracedStage* stages,
                                                          std::uint32_t room);
}

#endif
