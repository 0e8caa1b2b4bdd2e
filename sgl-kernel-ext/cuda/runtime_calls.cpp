// The table of calls.h, filled with CUDA's runtime.
#include <cuda_runtime_api.h>

#include "calls.h"
#include "scheduler.h"

namespace crosspool::gpu {

namespace {

static_assert(kNotReady == cudaErrorNotReady);
static_assert(kKernelNode == cudaGraphNodeTypeKernel && kMemcpyNode == cudaGraphNodeTypeMemcpy);
static_assert(kMemsetNode == cudaGraphNodeTypeMemset && kChildGraphNode == cudaGraphNodeTypeGraph);
static_assert(kUploadFlag == cudaGraphInstantiateFlagUpload);
static_assert(kDeviceLaunchFlag == cudaGraphInstantiateFlagDeviceLaunch);

cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }

Error host_alloc(void** memory, std::size_t bytes) {
  cudaError_t error = cudaHostAlloc(memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  if (error != cudaSuccess) return error;
  void* there = nullptr;
  error = cudaHostGetDevicePointer(&there, *memory, 0);
  if (error == cudaSuccess && there != *memory) error = cudaErrorNotSupported;
  if (error != cudaSuccess) cudaFreeHost(*memory);
  return error;
}

Error host_free(void* memory) { return cudaFreeHost(memory); }

Error device_alloc(void** memory, std::size_t bytes) { return cudaMalloc(memory, bytes); }

Error device_free(void* memory) { return cudaFree(memory); }

Error copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(stream));
}

Error clear(void* memory, std::size_t bytes, Stream stream) {
  return cudaMemsetAsync(memory, 0, bytes, stream_of(stream));
}

Error stream_create(Stream* stream) {
  cudaStream_t made = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
  *stream = made;
  return error;
}

Error stream_destroy(Stream stream) { return cudaStreamDestroy(stream_of(stream)); }

Error stream_query(Stream stream) { return cudaStreamQuery(stream_of(stream)); }

Error graph_nodes(Graph graph, Node* nodes, std::size_t* count) {
  return cudaGraphGetNodes(static_cast<cudaGraph_t>(graph),
                           reinterpret_cast<cudaGraphNode_t*>(nodes), count);
}

Error node_type(Node node, int* type) {
  cudaGraphNodeType found{};
  const cudaError_t error = cudaGraphNodeGetType(static_cast<cudaGraphNode_t>(node), &found);
  *type = found;
  return error;
}

Error child_graph(Node node, Graph* graph) {
  cudaGraph_t child = nullptr;
  const cudaError_t error =
      cudaGraphChildGraphNodeGetGraph(static_cast<cudaGraphNode_t>(node), &child);
  *graph = child;
  return error;
}

Error make_scheduler_graph(Graph* graph, GPULane* lane) {
  cudaGraph_t made = nullptr;
  const cudaError_t error = scheduler_graph(&made, lane);
  *graph = made;
  return error;
}

Error graph_destroy(Graph graph) { return cudaGraphDestroy(static_cast<cudaGraph_t>(graph)); }

Error instantiate(Exec* exec, Graph graph, unsigned flags, Stream stream, int* result) {
  cudaGraphInstantiateParams parameters{};
  parameters.flags = flags;
  parameters.uploadStream = stream_of(stream);
  cudaGraphExec_t made = nullptr;
  const cudaError_t error =
      cudaGraphInstantiateWithParams(&made, static_cast<cudaGraph_t>(graph), &parameters);
  *exec = made;
  *result = parameters.result_out;
  return error;
}

Error exec_destroy(Exec exec) { return cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(exec)); }

Error launch(Exec exec, Stream stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec), stream_of(stream));
}

const char* error_name(Error error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

constexpr Calls kRuntime = {
    host_alloc,           host_free,      device_alloc, device_free,  copy_to_device, clear,
    stream_create,        stream_destroy, stream_query, graph_nodes,  node_type,      child_graph,
    make_scheduler_graph, graph_destroy,  instantiate,  exec_destroy, launch,         error_name};

}  // namespace

const Calls& calls() { return kRuntime; }

}  // namespace crosspool::gpu
