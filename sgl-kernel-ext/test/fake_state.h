// What the fake driver knows: of fake_driver.cpp, which runs the work, and of fake_calls.cpp, which
// takes it.
#ifndef CROSSPOOL_TEST_FAKE_STATE_H
#define CROSSPOOL_TEST_FAKE_STATE_H

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>

#include "fake_driver.h"

namespace crosspool::fake {

using gpu::Error;
using gpu::Exec;
using gpu::GPULane;
using gpu::Graph;
using gpu::Node;
using gpu::Stream;

struct FakeNode {
  int type;
  Graph child;
};

struct FakeGraph {
  std::vector<std::unique_ptr<FakeNode>> nodes;
  std::function<void()> body;
  GPULane* lane = nullptr;  // a scheduler's
  int ticks = 1;
};

struct FakeExec {
  std::function<void()> body;
  GPULane* lane = nullptr;
  int ticks = 1;
  bool for_device = false;
  bool uploaded = false;
  int pending = 0;  // launches that have not ended
};

struct Work {
  enum Kind { kCopy, kClear, kUpload, kGraph } kind;
  FakeExec* exec = nullptr;
  std::vector<unsigned char> bytes;
  void* to = nullptr;
  int ticks = 0;  // done
  std::uint64_t number =
      0;  // the host's launches in their order; tail launches have their parent's
};

struct FakeStream {
  std::deque<Work> works;
  std::size_t connection = 0;
  Error error = gpu::kSuccess;
};

struct State {
  std::mt19937_64 random{1};
  std::uint64_t now = 10'000;
  std::vector<std::string> violations;
  std::map<void*, std::size_t> host, device;
  std::set<FakeGraph*> graphs;
  std::set<FakeExec*> execs;
  std::vector<FakeStream*> streams;
  std::size_t connections = 32, streams_made = 0;
  std::uint64_t launches = 0;
  std::set<Knob> knobs;
  std::map<std::string, std::pair<int, int>> failures;  // name: successes left, error
  int tail_error = 0, relaunch_error = 0;
  int under_way = 0;
  std::function<void(GPULane*)> pass_hook;
  std::function<void()> stage_hook;
};

extern State state;

// Whether a stream has a scheduler, which never ends.
bool resident();

// Keeps what a caller did wrong; returns `error`.
int violate(const std::string& what, int error = kInvalidValue);

}  // namespace crosspool::fake

#endif
