#include "fake_driver.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>

#include "../cuda/pass.h"

namespace crosspool::fake {

using gpu::Error;
using gpu::Exec;
using gpu::Graph;
using gpu::Lane;
using gpu::Node;
using gpu::Stream;

namespace {

struct FakeNode {
  int type;
  Graph child;
};

struct FakeGraph {
  std::vector<std::unique_ptr<FakeNode>> nodes;
  std::function<void()> body;
  Lane* lane = nullptr;  // a scheduler's
  int ticks = 1;
};

struct FakeExec {
  std::function<void()> body;
  Lane* lane = nullptr;
  int ticks = 1;
  bool for_device = false;
  bool uploaded = false;
  int pending = 0;  // launches that have not ended
};

struct Work {
  enum Kind { kCopy, kUpload, kGraph } kind;
  FakeExec* exec = nullptr;
  std::vector<unsigned char> bytes;
  void* to = nullptr;
  int ticks = 0;  // done
};

struct FakeStream {
  std::deque<Work> works;
  Error error = gpu::kSuccess;
};

struct State {
  std::mt19937_64 random{1};
  std::uint64_t now = 1000;
  std::vector<std::string> violations;
  std::map<void*, std::size_t> host, device;
  std::set<FakeGraph*> graphs;
  std::set<FakeExec*> execs;
  std::vector<FakeStream*> streams;
  std::set<Knob> knobs;
  std::map<std::string, std::pair<int, int>> failures;  // name: successes left, error
  int tail_error = 0;
  int under_way = 0;
  std::function<void(Lane*)> pass_hook;
  std::function<void()> stage_hook;
};

State state;

int violate(const std::string& what, int error = kInvalidValue) {
  state.violations.push_back(what);
  return error;
}

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

// What an execution of a graph launches from the device.
struct TailLaunches {
  FakeExec* self;
  std::deque<Work> queue;
  bool itself = false;

  std::uint32_t add(FakeExec* exec) {
    if (state.execs.count(exec) == 0) return violate("a tail launch of what is no exec");
    if (!exec->for_device) return violate("a tail launch of an exec not made for the device");
    if (!exec->uploaded) return violate("a tail launch of an exec that was not uploaded");
    if (queue.size() == kMaxTailLaunches) {
      return violate("more than 255 pending tail launches", kPendingCountExceeded);
    }
    if (exec == self) {
      if (itself) return violate("a second pending launch of itself");
      itself = true;
    } else if (exec->pending > 0) {
      return violate("a launch of an exec that has not ended");
    }
    ++exec->pending;
    queue.push_back({Work::kGraph, exec, {}, nullptr, 0});
    return 0;
  }
};

struct HostDriver {
  TailLaunches& tails;

  std::uint32_t thread() const { return 0; }
  std::uint32_t threads() const { return 1; }
  bool any(bool mine) const { return mine; }
  std::uint64_t now() const { return state.now; }
  void pause() const { state.now += 200; }
  std::uint32_t launch(std::uint64_t exec) const {
    if (state.tail_error != 0) return std::exchange(state.tail_error, 0);
    auto* stage = reinterpret_cast<FakeExec*>(exec);
    std::uint32_t error = tails.add(stage);
    if (state.knobs.count(Knob::kFloodTails) != 0) {
      for (std::size_t i = 0; i <= kMaxTailLaunches && error == 0; ++i) {
        tails.queue.push_back({Work::kCopy, nullptr, {}, nullptr, 0});
        if (tails.queue.size() > kMaxTailLaunches) {
          error = violate("more than 255 pending tail launches", kPendingCountExceeded);
        }
      }
    }
    return error;
  }
  std::uint32_t relaunch() const {
    const std::uint32_t error = tails.add(tails.self);
    const bool twice = state.knobs.count(Knob::kRelaunchTwice) != 0;
    return error == 0 && twice ? tails.add(tails.self) : error;
  }
};

void run_graph(FakeStream& stream) {
  Work& work = stream.works.front();
  FakeExec& exec = *work.exec;
  if (exec.lane == nullptr && work.ticks == 0) {
    if (state.stage_hook) state.stage_hook();
    ++state.under_way;
  }
  if (++work.ticks < exec.ticks) return;
  TailLaunches tails{&exec, {}};
  if (exec.lane != nullptr) {
    if (state.pass_hook) state.pass_hook(exec.lane);
    HostDriver driver{tails};
    gpu::schedule(*exec.lane, driver);
  } else {
    exec.body();
    --state.under_way;
  }
  stream.works.pop_front();
  --exec.pending;
  stream.works.insert(stream.works.begin(), tails.queue.begin(), tails.queue.end());
}

void progress(FakeStream& stream) {
  state.now += 100;
  if (stream.works.empty() || stream.error != gpu::kSuccess) return;
  Work& work = stream.works.front();
  if (work.kind == Work::kGraph) return run_graph(stream);
  if (work.kind == Work::kCopy && work.to != nullptr) {
    std::memcpy(work.to, work.bytes.data(), work.bytes.size());
  }
  if (work.kind == Work::kUpload) work.exec->uploaded = true;
  stream.works.pop_front();
}

// Within one allocation.
bool allocated(const void* begin, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  return std::any_of(state.device.begin(), state.device.end(), [&](const auto& one) {
    const auto first = reinterpret_cast<std::uintptr_t>(one.first);
    return address >= first && address + bytes <= first + one.second;
  });
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
  return allocate(state.host, memory, bytes);
}

Error host_free(void* memory) { return release(state.host, memory); }

Error device_alloc(void** memory, std::size_t bytes) {
  if (const Error error = injected("device_alloc")) return error;
  return allocate(state.device, memory, bytes);
}

Error device_free(void* memory) { return release(state.device, memory); }

Error copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  if (const Error error = injected("copy_to_device")) return error;
  if (!allocated(to, bytes)) return violate("a copy to what is not device memory");
  const auto* begin = static_cast<const unsigned char*>(from);
  static_cast<FakeStream*>(stream)->works.push_back(
      {Work::kCopy, nullptr, {begin, begin + bytes}, to, 0});
  return gpu::kSuccess;
}

Error stream_create(Stream* stream) {
  if (const Error error = injected("stream_create")) return error;
  state.streams.push_back(new FakeStream);
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

Error scheduler_graph(Graph* graph, Lane* lane) {
  if (const Error error = injected("scheduler_graph")) return error;
  if (!allocated(lane, sizeof(Lane))) return violate("a lane lies outside device memory");
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
    static_cast<FakeStream*>(stream)->works.push_back({Work::kUpload, made, {}, nullptr, 0});
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
  static_cast<FakeStream*>(stream)->works.push_back({Work::kGraph, found, {}, nullptr, 0});
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

Graph make_graph(std::function<void()> body, int ticks) {
  auto* graph = new FakeGraph;
  graph->body = std::move(body);
  graph->ticks = ticks;
  state.graphs.insert(graph);
  add_node(graph, gpu::kKernelNode);
  return graph;
}

void add_node(Graph graph, int type, Graph child) {
  static_cast<FakeGraph*>(graph)->nodes.push_back(
      std::make_unique<FakeNode>(FakeNode{type, child}));
}

void remove_nodes(Graph graph) { static_cast<FakeGraph*>(graph)->nodes.clear(); }

void destroy_graph(Graph graph) {
  auto* found = static_cast<FakeGraph*>(graph);
  state.graphs.erase(found);
  delete found;
}

void seed(std::uint64_t value) { state.random.seed(value); }

void run(int units) {
  for (int i = 0; i < units && !state.streams.empty(); ++i) {
    progress(*state.streams[state.random() % state.streams.size()]);
  }
}

void turn(Knob knob) { state.knobs.insert(knob); }

void fail_call(const std::string& name, int successes, int error) {
  state.failures[name] = {successes, error};
}

void fail_tail_launch(int error) { state.tail_error = error; }

void fault_stage() {
  for (FakeStream* stream : state.streams) {
    if (stream->works.empty()) continue;
    stream->error = kIllegalAddress;
    for (const Work& work : stream->works) {
      if (work.kind == Work::kGraph) --work.exec->pending;
    }
    stream->works.clear();
  }
}

void on_pass(std::function<void(Lane*)> hook) { state.pass_hook = std::move(hook); }

void on_stage(std::function<void()> hook) { state.stage_hook = std::move(hook); }

const std::vector<std::string>& violations() { return state.violations; }

std::size_t live() {
  return state.host.size() + state.device.size() + state.streams.size() + state.graphs.size() +
         state.execs.size();
}

std::uint64_t now_ns() { return state.now; }

int stages_under_way() { return state.under_way; }

void reset() { state = State{}; }

}  // namespace crosspool::fake

namespace crosspool::gpu {

const Calls& calls() {
  static constexpr Calls kFake = {fake::host_alloc,     fake::host_free,      fake::device_alloc,
                                  fake::device_free,    fake::copy_to_device, fake::stream_create,
                                  fake::stream_destroy, fake::stream_query,   fake::graph_nodes,
                                  fake::node_type,      fake::child_graph,    fake::scheduler_graph,
                                  fake::graph_destroy,  fake::instantiate,    fake::exec_destroy,
                                  fake::launch,         fake::error_name};
  return kFake;
}

}  // namespace crosspool::gpu
