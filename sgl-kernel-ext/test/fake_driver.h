// A driver for the resident loop's calls (cuda/calls.h) that runs on the host and enforces what
// CUDA documents of graphs that are launched from the device:
// - kernel, memcpy, memset and child graph nodes only, at least one that does work;
// - instantiated for it, and uploaded, before such a launch;
// - an exec is launched again only when it has ended; it may wait to be launched once more by
//   itself;
// - at most 255 tail launches by one execution of a graph;
// - a graph's tail launches run in their order when it has ended, before anything behind it;
// - freeing device memory waits for all work, and so for ever beside a resident loop; so may
//   allocating memory of the device or of the host, creating a stream and instantiating a graph;
// - streams are dealt to connections in turn. Work waits for a resident loop that was launched
//   before it on the same connection.
//
// It is one thread: work progresses in run() and in stream queries, a random stream's each time, so
// that lanes, devices and the host interleave in every way. A unit of progress takes 1 us, and no
// two executions of a scheduler have quite the same clock. Device memory is not zero at first.
// A refused operation returns an error and is kept as a violation, which the tests look at.
#ifndef CROSSPOOL_TEST_FAKE_DRIVER_H
#define CROSSPOOL_TEST_FAKE_DRIVER_H

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../cuda/calls.h"

namespace crosspool::fake {

inline constexpr int kInvalidValue = 1;
inline constexpr int kIllegalAddress = 700;
inline constexpr int kPendingCountExceeded = 69;
inline constexpr std::size_t kMaxTailLaunches = 255;

// A captured graph: a kernel node that runs `body` on the host, in `ticks` units of progress.
gpu::Graph make_graph(std::function<void()> body, int ticks = 1);
// One more node, of a cudaGraphNodeType.
void add_node(gpu::Graph graph, int type, gpu::Graph child = nullptr);
void remove_nodes(gpu::Graph graph);
void destroy_graph(gpu::Graph graph);

void seed(std::uint64_t value);
// Connections to which streams are dealt, from the next stream on; 32 at first.
void connections(std::size_t count);
// Units of progress, each on a stream that has work.
void run(int units);

enum class Knob { kDropUpload, kDropDeviceLaunch, kRelaunchTwice, kFloodTails };
// Breaks the driver's callers on purpose; until reset().
void turn(Knob knob);
// The call with this name (a member of gpu::Calls) fails the next time after `successes` more.
void fail_call(const std::string& name, int successes, int error);
// A tail launch of a stage fails the next time.
void fail_tail_launch(int error);
// A scheduler's launch of itself behind a stage fails the next time.
void fail_relaunch(int error);
// The execution that is under way on a stream with stages ends in an illegal address.
void fault_stage();

// Called before each execution of a scheduler, and before each of a stage.
void on_pass(std::function<void(gpu::GPULane*)> hook);
void on_stage(std::function<void()> hook);

const std::vector<std::string>& violations();
// Allocations, streams, graphs and execs that were not given back.
std::size_t live();
std::uint64_t now_ns();
// Stages that are under way, over all streams.
int stages_under_way();
// Forgets everything; what is live is leaked.
void reset();

}  // namespace crosspool::fake

#endif
