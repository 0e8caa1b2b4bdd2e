#include "fake_driver.h"

#include <algorithm>
#include <cstring>

#include "../cuda/pass.h"
#include "../cuda/residency.h"
#include "fake_state.h"

namespace crosspool::fake {

State state;

int violate(const std::string& what, int error) {
  state.violations.push_back(what);
  return error;
}

namespace {

constexpr std::uint64_t kClockSkewNs = 1500;

// What an execution of a graph launches from the device.
struct TailLaunches {
  FakeExec* self;
  std::uint64_t number;
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
    queue.push_back({Work::kGraph, exec, {}, nullptr, 0, number});
    return 0;
  }
};

struct HostDriver {
  TailLaunches& tails;
  std::uint64_t behind;  // ns: the clocks of two multiprocessors differ

  std::uint32_t thread() const { return 0; }
  std::uint32_t threads() const { return 1; }
  bool any(bool mine) const { return mine; }
  std::uint64_t now() const { return state.now - behind; }
  void pause() const { state.now += 200; }
  std::uint32_t launch(std::uint64_t exec) const {
    if (state.tail_error != 0) return std::exchange(state.tail_error, 0);
    auto* stage = reinterpret_cast<FakeExec*>(exec);
    std::uint32_t error = tails.add(stage);
    if (state.knobs.count(Knob::kFloodTails) != 0) {
      for (std::size_t i = 0; i <= kMaxTailLaunches && error == 0; ++i) {
        tails.queue.push_back({Work::kCopy, nullptr, {}, nullptr, 0, tails.number});
        if (tails.queue.size() > kMaxTailLaunches) {
          error = violate("more than 255 pending tail launches", kPendingCountExceeded);
        }
      }
    }
    return error;
  }
  std::uint32_t relaunch() const {
    if (!tails.queue.empty() && state.relaunch_error != 0) {
      return std::exchange(state.relaunch_error, 0);
    }
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
  TailLaunches tails{&exec, work.number, {}};
  if (exec.lane != nullptr) {
    if (state.pass_hook) state.pass_hook(exec.lane);
    HostDriver driver{tails, state.random() % kClockSkewNs};
    gpu::schedule(*exec.lane, driver);
  } else {
    exec.body();
    --state.under_way;
  }
  stream.works.pop_front();
  --exec.pending;
  stream.works.insert(stream.works.begin(), tails.queue.begin(), tails.queue.end());
}

bool is_resident(const FakeStream& stream) {
  return std::any_of(stream.works.begin(), stream.works.end(), [](const Work& work) {
    return work.kind == Work::kGraph && work.exec->lane != nullptr;
  });
}

// Whether the stream's next work lies behind a resident loop on the same connection.
bool is_stuck(const FakeStream& stream) {
  return std::any_of(state.streams.begin(), state.streams.end(), [&](const FakeStream* other) {
    return other != &stream && other->connection == stream.connection && is_resident(*other) &&
           other->works.front().number < stream.works.front().number;
  });
}

void progress(FakeStream& stream) {
  state.now += 1000;
  if (stream.works.empty() || stream.error != gpu::kSuccess || is_stuck(stream)) return;
  Work& work = stream.works.front();
  if (work.kind == Work::kGraph) return run_graph(stream);
  if (work.kind == Work::kCopy && work.to != nullptr) {
    std::memcpy(work.to, work.bytes.data(), work.bytes.size());
  }
  if (work.kind == Work::kClear) std::memset(work.to, 0, work.bytes.size());
  if (work.kind == Work::kUpload) work.exec->uploaded = true;
  stream.works.pop_front();
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

bool resident() {
  return std::any_of(state.streams.begin(), state.streams.end(),
                     [](const FakeStream* stream) { return is_resident(*stream); });
}

void connections(std::size_t count) { state.connections = count; }

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

void fail_relaunch(int error) { state.relaunch_error = error; }

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

void on_pass(std::function<void(GPULane*)> hook) { state.pass_hook = std::move(hook); }

void on_stage(std::function<void()> hook) { state.stage_hook = std::move(hook); }

const std::vector<std::string>& violations() { return state.violations; }

std::size_t live() {
  return state.host.size() + state.device.size() + state.streams.size() + state.graphs.size() +
         state.execs.size();
}

std::uint64_t now_ns() { return state.now; }

int stages_under_way() { return state.under_way; }

void reset() {
  state = State{};
  gpu::resident_lanes = 0;  // those of loops that never left
}

}  // namespace crosspool::fake
