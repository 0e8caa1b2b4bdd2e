#ifndef CROSSPOOL_CUDA_SCHEDULER_H
#define CROSSPOOL_CUDA_SCHEDULER_H

#include <cuda_runtime_api.h>

namespace crosspool::gpu {

class GPULane;

// A graph of one node, the scheduler of a lane in device memory; not instantiated yet.
cudaError_t scheduler_graph(cudaGraph_t* graph, GPULane* lane);

}  // namespace crosspool::gpu

#endif
