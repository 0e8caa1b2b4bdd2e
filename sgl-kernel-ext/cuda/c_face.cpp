// loop.h: exceptions become messages.
#include <array>
#include <exception>
#include <stdexcept>
#include <string>

#include "loop.h"
#include "resident.h"

namespace {

using crosspool::gpu::GPULoop;

thread_local std::string error;

// What `body` returns, or -1.
template <class Body>
std::int32_t guarded(Body body) {
  try {
    return body();
  } catch (const std::exception& caught) {
    error = caught.what();
    return -1;
  }
}

}  // namespace

const char* crosspool_cuda_error() { return error.c_str(); }

std::int32_t crosspool_cuda_sizes(std::uint64_t* sizes, std::int32_t count) {
  using namespace crosspool::gpu;
  constexpr std::array kSizes = {sizeof(StageWords),         sizeof(GPUStepArguments),
                                 sizeof(LaneStatus),         sizeof(crosspool::LinkMemory),
                                 sizeof(ModelDescription),   sizeof(LaneDescription),
                                 sizeof(GPULoopDescription), sizeof(crosspool::Command),
                                 sizeof(crosspool::Event),   sizeof(TracedStage)};
  for (std::int32_t i = 0; i < count && i < static_cast<std::int32_t>(kSizes.size()); ++i) {
    sizes[i] = kSizes[i];
  }
  return kSizes.size();
}

GPULoop* crosspool_cuda_loop_create(const crosspool::gpu::GPULoopDescription* description) {
  GPULoop* loop = nullptr;
  guarded([&] {
    loop = new GPULoop(*description);
    return 0;
  });
  return loop;
}

std::int32_t crosspool_cuda_loop_free(GPULoop* loop) {
  return guarded([&] {
    crosspool::gpu::not_beside_a_loop("freeing the loop");
    delete loop;
    return 0;
  });
}

std::int32_t crosspool_cuda_loop_add_graph(GPULoop* loop, std::uint32_t lane, std::uint32_t model,
                                           std::uint32_t stage, std::uint32_t bucket, void* graph) {
  return guarded([&] {
    loop->add_graph(lane, model, stage, bucket, graph);
    return 0;
  });
}

std::int32_t crosspool_cuda_loop_start(GPULoop* loop) {
  return guarded([&] {
    loop->start();
    return 0;
  });
}

std::int32_t crosspool_cuda_loop_probe(GPULoop* loop, void* beside, std::int64_t timeout_ns,
                                       std::uint8_t* stuck) {
  return guarded([&] { return static_cast<std::int32_t>(loop->probe(beside, timeout_ns, stuck)); });
}

std::int32_t crosspool_cuda_loop_quiesce(GPULoop* loop, std::int64_t timeout_ns) {
  return guarded([&] {
    loop->quiesce(timeout_ns);
    return 0;
  });
}

std::int32_t crosspool_cuda_loop_push_step(GPULoop* loop, std::uint32_t lane,
                                           const crosspool::gpu::GPUStepArguments* arguments) {
  return guarded([&] { return loop->push_step(lane, *arguments) ? 1 : 0; });
}

std::int32_t crosspool_cuda_loop_push(GPULoop* loop, std::uint32_t lane,
                                      const crosspool::Command* command) {
  return guarded([&] { return loop->push(lane, *command) ? 1 : 0; });
}

std::int32_t crosspool_cuda_loop_pop(GPULoop* loop, crosspool::Event* event) {
  return guarded([&] { return loop->pop(event) ? 1 : 0; });
}

std::int32_t crosspool_cuda_loop_wait(GPULoop* loop, std::int64_t timeout_ns) {
  return guarded([&] { return loop->wait(timeout_ns) ? 1 : 0; });
}

std::int32_t crosspool_cuda_loop_status(GPULoop* loop, std::uint32_t lane,
                                        crosspool::gpu::LaneStatus* status) {
  return guarded([&] {
    *status = loop->status(lane);
    return 0;
  });
}

std::int32_t crosspool_cuda_loop_trace_start(GPULoop* loop) {
  return guarded([&] {
    loop->trace_start();
    return 0;
  });
}

std::int32_t crosspool_cuda_loop_trace_stop(GPULoop* loop, crosspool::gpu::TracedStage* stages,
                                            std::uint32_t room) {
  return guarded([&] { return static_cast<std::int32_t>(loop->trace_stop(stages, room)); });
}
