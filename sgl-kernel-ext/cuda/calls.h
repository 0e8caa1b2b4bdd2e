// The calls of CUDA's runtime that the resident loop needs, as a table. runtime_calls.cpp fills it
// with the runtime, test/fake_calls.cpp with a driver on the host that enforces the documented
// limits.
#ifndef CROSSPOOL_CUDA_CALLS_H
#define CROSSPOOL_CUDA_CALLS_H

#include <cstddef>

namespace crosspool::gpu {

class GPULane;

using Graph = void*;   // cudaGraph_t
using Node = void*;    // cudaGraphNode_t
using Exec = void*;    // cudaGraphExec_t
using Stream = void*;  // cudaStream_t
using Error = int;     // cudaError_t

inline constexpr Error kSuccess = 0;
inline constexpr Error kNotReady = 600;

// Values of cudaGraphNodeType that a graph launched from the device may hold.
inline constexpr int kKernelNode = 0;
inline constexpr int kMemcpyNode = 1;
inline constexpr int kMemsetNode = 2;
inline constexpr int kChildGraphNode = 4;

// cudaGraphInstantiateFlags.
inline constexpr unsigned kUploadFlag = 2;
inline constexpr unsigned kDeviceLaunchFlag = 4;

struct Calls {
  // Mapped memory, at the same address on the device.
  Error (*host_alloc)(void** memory, std::size_t bytes);
  Error (*host_free)(void* memory);
  Error (*device_alloc)(void** memory, std::size_t bytes);
  Error (*device_free)(void* memory);
  Error (*copy_to_device)(void* to, const void* from, std::size_t bytes, Stream stream);
  Error (*clear)(void* memory, std::size_t bytes, Stream stream);  // device memory; does not wait

  Error (*stream_create)(Stream* stream);  // a stream that does not wait for the default one
  Error (*stream_destroy)(Stream stream);
  Error (*stream_query)(Stream stream);  // kNotReady: work is under way

  // With null nodes only the count.
  Error (*graph_nodes)(Graph graph, Node* nodes, std::size_t* count);
  Error (*node_type)(Node node, int* type);
  Error (*child_graph)(Node node, Graph* graph);
  Error (*scheduler_graph)(Graph* graph, GPULane* lane);  // of one node, the lane's scheduler
  Error (*graph_destroy)(Graph graph);
  // `result`: a cudaGraphInstantiateResult.
  Error (*instantiate)(Exec* exec, Graph graph, unsigned flags, Stream stream, int* result);
  Error (*exec_destroy)(Exec exec);
  Error (*launch)(Exec exec, Stream stream);

  const char* (*error_name)(Error error);
};

const Calls& calls();

// Throws std::runtime_error, which names `what` was being done, unless `error` is kSuccess.
void check(Error error, const char* what);

}  // namespace crosspool::gpu

#endif
