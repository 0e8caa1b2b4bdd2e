// The scheduler graph of a lane: one kernel of one warp, whose first thread runs the lane's state
// machine. It launches the stage's graph and then itself, both as tail launches.
#include "pass.h"
#include "scheduler.h"

namespace crosspool::gpu {

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kPauseNs = 200;

struct DeviceDriver {
  __device__ std::uint32_t thread() const { return threadIdx.x; }
  __device__ std::uint32_t threads() const { return kWarp; }
  // Orders what all threads read and wrote before it before what the first thread does after it.
  __device__ bool any(bool mine) const {
    const bool yes = __any_sync(~0U, mine) != 0;
    __syncwarp();
    return yes;
  }
  __device__ std::uint64_t now() const {
    std::uint64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
  }
  __device__ void pause() const { __nanosleep(kPauseNs); }
  __device__ std::uint32_t launch(std::uint64_t exec) const {
    return cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(exec), cudaStreamGraphTailLaunch);
  }
  __device__ std::uint32_t relaunch() const {
    return cudaGraphLaunch(cudaGetCurrentGraphExec(), cudaStreamGraphTailLaunch);
  }
};

__global__ void __launch_bounds__(kWarp) scheduler(GPULane* lane) {
  DeviceDriver driver;
  schedule(*lane, driver);
}

}  // namespace

cudaError_t scheduler_graph(cudaGraph_t* graph, GPULane* lane) {
  cudaGraph_t made = nullptr;
  if (const cudaError_t error = cudaGraphCreate(&made, 0); error != cudaSuccess) return error;
  void* arguments[] = {&lane};
  cudaKernelNodeParams parameters{};
  parameters.func = reinterpret_cast<void*>(scheduler);
  parameters.gridDim = dim3(1);
  parameters.blockDim = dim3(kWarp);
  parameters.kernelParams = arguments;
  cudaGraphNode_t node = nullptr;
  const cudaError_t error = cudaGraphAddKernelNode(&node, made, nullptr, 0, &parameters);
  if (error == cudaSuccess) {
    *graph = made;
  } else {
    cudaGraphDestroy(made);
  }
  return error;
}

}  // namespace crosspool::gpu
