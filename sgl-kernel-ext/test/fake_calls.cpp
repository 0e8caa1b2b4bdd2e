// The fake driver's side of cuda/calls.h.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../cuda/lane.h"
#include "fake_state.h"

namespace crosspool::fake {

namespace {

// An error that was asked for; 0: none.
Error injected(const std::string& name) {
  const auto found = state.failures.find(name);
  if (found == state.failures.end() || found->second.first-- > 0) return gpu::kSuccess;
  const Error error = found->second.second;
  state.failures.erase(found);
  return error;
}

bool may_be_launched(const FakeNode& node) {
  const auto* child = static_cast<const FakeGraph*>(node.child);
  return node.type == gpu::kKernelNode || node.type == gpu::kMemcpyNode ||
         node.type == gpu::kMemsetNode ||
         (node.type == gpu::kChildGraphNode && child != nullptr &&
          std::all_of(child->nodes.begin(), child->nodes.end(),
                      [](const auto& one) { return may_be_launched(*one); }));
}

// Within one allocation.
bool allocated(const void* begin, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  return std::any_of(state.device.begin(), state.device.end(), [&](const auto& one) {
    const auto first = reinterpret_cast<std::uintptr_t>(one.first);
    return address >= first && address + bytes <= first + one.second;
  });
}

// What CUDA may hold back until the device has no work.
void may_wait(const std::string& what) {
  if (resident()) violate(what + " beside a resident loop, behind which it may wait for ever");
}

Error allocate(std::map<void*, std::size_t>& into, void** memory, std::size_t bytes) {
  *memory = std::aligned_alloc(256, aligned_up(bytes, 256));
  std::memset(*memory, 0xCD, bytes);
  into[*memory] = bytes;
  return gpu::kSuccess;
}

Error release(std::map<void*, std::size_t>& from, void* memory) {
  if (from.erase(memory) == 0) return violate("memory is freed that was not allocated");
  std::free(memory);
  return gpu::kSuccess;
}

Error host_alloc(void** memory, std::size_t bytes) {
  if (const Error error = injected("host_alloc")) return error;
  may_wait("page-locked memory is allocated");
  return allocate(state.host, memory, bytes);
}

Error host_free(void* memory) {
  may_wait("page-locked memory is freed");
  return release(state.host, memory);
}

Error device_alloc(void** memory, std::size_t bytes) {
  if (const Error error = injected("device_alloc")) return error;
  may_wait("device memory is allocated");
  return allocate(state.device, memory, bytes);
}

Error device_free(void* memory) {
  for (const FakeStream* stream : state.streams) {
    if (!stream->works.empty()) violate("device memory is freed while a stream has work");
  }
  return release(state.device, memory);
}

Error copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  if (const Error error = injected("copy_to_device")) return error;
  if (!allocated(to, bytes)) return violate("a copy to what is not device memory");
  const auto* begin = static_cast<const unsigned char*>(from);
  static_cast<FakeStream*>(stream)->works.push_back(
      {Work::kCopy, nullptr, {begin, begin + bytes}, to, 0, ++state.launches});
  return gpu::kSuccess;
}

Error clear(void* memory, std::size_t bytes, Stream stream) {
  if (const Error error = injected("clear")) return error;
  if (!allocated(memory, bytes)) return violate("what is cleared is not device memory");
  static_cast<FakeStream*>(stream)->works.push_back(
      {Work::kClear, nullptr, std::vector<unsigned char>(bytes), memory, 0, ++state.launches});
  return gpu::kSuccess;
}

Error stream_create(Stream* stream) {
  if (const Error error = injected("stream_create")) return error;
  may_wait("a stream is created");
  state.streams.push_back(new FakeStream);
  state.streams.back()->connection = state.streams_made++ % state.connections;
  *stream = state.streams.back();
  return gpu::kSuccess;
}

Error stream_destroy(Stream stream) {
  auto* found = static_cast<FakeStream*>(stream);
  if (!found->works.empty()) violate("a stream is destroyed that has work");
  state.streams.erase(std::find(state.streams.begin(), state.streams.end(), found));
  delete found;
  return gpu::kSuccess;
}

Error stream_query(Stream stream) {
  if (const Error error = injected("stream_query")) return error;
  run(1);
  const auto* found = static_cast<FakeStream*>(stream);
  if (found->error != gpu::kSuccess) return found->error;
  return found->works.empty() ? gpu::kSuccess : gpu::kNotReady;
}

Error graph_nodes(Graph graph, Node* nodes, std::size_t* count) {
  const auto* found = static_cast<FakeGraph*>(graph);
  if (nodes != nullptr) {
    for (std::size_t i = 0; i < *count; ++i) nodes[i] = found->nodes[i].get();
  }
  *count = found->nodes.size();
  return gpu::kSuccess;
}

Error node_type(Node node, int* type) {
  *type = static_cast<FakeNode*>(node)->type;
  return gpu::kSuccess;
}

Error child_graph(Node node, Graph* graph) {
  *graph = static_cast<FakeNode*>(node)->child;
  return gpu::kSuccess;
}

Error scheduler_graph(Graph* graph, GPULane* lane) {
  if (const Error error = injected("scheduler_graph")) return error;
  if (!allocated(lane, sizeof(GPULane))) return violate("a lane lies outside device memory");
  *graph = make_graph([] {});
  static_cast<FakeGraph*>(*graph)->lane = lane;
  return gpu::kSuccess;
}

Error graph_destroy(Graph graph) {
  destroy_graph(graph);
  return gpu::kSuccess;
}

Error instantiate(Exec* exec, Graph graph, unsigned flags, Stream stream, int* result) {
  if (const Error error = injected("instantiate")) return error;
  may_wait("a graph is instantiated");
  const auto* from = static_cast<FakeGraph*>(graph);
  if (state.knobs.count(Knob::kDropUpload) != 0) flags &= ~gpu::kUploadFlag;
  if (state.knobs.count(Knob::kDropDeviceLaunch) != 0) flags &= ~gpu::kDeviceLaunchFlag;
  const bool for_device = (flags & gpu::kDeviceLaunchFlag) != 0;
  for (const auto& node : from->nodes) {
    if (for_device && !may_be_launched(*node)) {
      *result = 3;  // cudaGraphInstantiateNodeOperationNotSupported
      return violate("a node that the device cannot launch");
    }
  }
  auto* made = new FakeExec{from->body, from->lane, from->ticks, for_device, false, 0};
  state.execs.insert(made);
  if ((flags & gpu::kUploadFlag) != 0) {
    static_cast<FakeStream*>(stream)->works.push_back(
        {Work::kUpload, made, {}, nullptr, 0, ++state.launches});
  }
  *exec = made;
  *result = 0;
  return gpu::kSuccess;
}

Error exec_destroy(Exec exec) {
  auto* found = static_cast<FakeExec*>(exec);
  if (found->pending > 0) violate("an exec is destroyed that has not ended");
  if (state.execs.erase(found) == 0) return violate("what is no exec is destroyed");
  delete found;
  return gpu::kSuccess;
}

Error launch(Exec exec, Stream stream) {
  if (const Error error = injected("launch")) return error;
  auto* found = static_cast<FakeExec*>(exec);
  if (state.execs.count(found) == 0) return violate("a launch of what is no exec");
  if (found->pending > 0) return violate("a launch from the host of an exec that has not ended");
  found->uploaded = true;  // a launch from the host uploads too
  ++found->pending;
  static_cast<FakeStream*>(stream)->works.push_back(
      {Work::kGraph, found, {}, nullptr, 0, ++state.launches});
  return gpu::kSuccess;
}

const char* error_name(Error error) {
  switch (error) {
    case kInvalidValue:
      return "cudaErrorInvalidValue";
    case kPendingCountExceeded:
      return "cudaErrorLaunchPendingCountExceeded";
    case kIllegalAddress:
      return "cudaErrorIllegalAddress";
    default:
      return "an error of the fake driver";
  }
}

}  // namespace

}  // namespace crosspool::fake

namespace crosspool::gpu {

const Calls& calls() {
  static constexpr Calls kFake = {fake::host_alloc,      fake::host_free,      fake::device_alloc,
                                  fake::device_free,     fake::copy_to_device, fake::clear,
                                  fake::stream_create,   fake::stream_destroy, fake::stream_query,
                                  fake::graph_nodes,     fake::node_type,      fake::child_graph,
                                  fake::scheduler_graph, fake::graph_destroy,  fake::instantiate,
                                  fake::exec_destroy,    fake::launch,         fake::error_name};
  return kFake;
}

}  // namespace crosspool::gpu
