#include "graph_table.h"

#include <array>
#include <stdexcept>

#include "residency.h"

namespace crosspool::gpu {

namespace {

constexpr std::array<const char*, 14> kNodeNames = {"kernel",
                                                    "memcpy",
                                                    "memset",
                                                    "host",
                                                    "child graph",
                                                    "empty",
                                                    "event wait",
                                                    "event record",
                                                    "semaphore signal",
                                                    "semaphore wait",
                                                    "allocation",
                                                    "free",
                                                    "batched memory operation",
                                                    "conditional"};

constexpr std::array<const char*, 6> kResultNames = {"success",
                                                     "an unexpected error",
                                                     "an invalid structure",
                                                     "an operation that the device cannot launch",
                                                     "nodes of several devices",
                                                     "an unused conditional handle"};

constexpr std::array<const char*, kStages> kStageNames = {
    "embed", "feed", "attention", "dense FFN", "MoE FFN", "head", "dispatch", "combine"};

std::vector<Node> nodes(Graph graph) {
  std::size_t count = 0;
  check(calls().graph_nodes(graph, nullptr, &count), "counting a graph's nodes");
  std::vector<Node> found(count);
  if (count > 0) check(calls().graph_nodes(graph, found.data(), &count), "listing a graph's nodes");
  return found;
}

// Returns the number of nodes that do work. Throws for a node that the device does not launch.
std::size_t check_nodes(Graph graph, const std::string& what) {
  std::size_t working = 0;
  for (const Node node : nodes(graph)) {
    int type = 0;
    check(calls().node_type(node, &type), "reading a node's type");
    if (type == kChildGraphNode) {
      Graph child = nullptr;
      check(calls().child_graph(node, &child), "reading a child graph");
      working += check_nodes(child, what);
    } else if (type == kKernelNode || type == kMemcpyNode || type == kMemsetNode) {
      ++working;
    } else {
      const bool known = type >= 0 && type < static_cast<int>(kNodeNames.size());
      throw std::runtime_error(what + ": it holds a node of type '" +
                               (known ? kNodeNames[type] : std::to_string(type)) +
                               "'; the device launches kernel, memcpy, memset and child graph "
                               "nodes only");
    }
  }
  return working;
}

}  // namespace

Exec instantiate(Graph graph, Stream stream, const std::string& what) {
  not_beside_a_loop("instantiating " + what);
  if (check_nodes(graph, what) == 0) {
    throw std::runtime_error(what + ": it is empty; the device launches no empty graph");
  }
  Exec exec = nullptr;
  int result = 0;
  const Error error =
      calls().instantiate(&exec, graph, kDeviceLaunchFlag | kUploadFlag, stream, &result);
  if (error == kSuccess && result == 0) return exec;
  const bool known = result > 0 && result < static_cast<int>(kResultNames.size());
  throw std::runtime_error(what + ": instantiating it for the device failed (" +
                           calls().error_name(error) +
                           "): " + (known ? kResultNames[result] : "no reason is given"));
}

GraphTable::GraphTable(std::uint32_t lanes, std::uint32_t models, std::uint32_t buckets)
    : lanes_(lanes),
      models_(models),
      buckets_(buckets),
      execs_(lanes * Tables{nullptr, nullptr, models, buckets}.places()),
      device_(execs_.size()) {}

GraphTable::~GraphTable() {
  for (const std::uint64_t exec : execs_) {
    if (exec != 0) calls().exec_destroy(reinterpret_cast<Exec>(exec));
  }
}

std::size_t GraphTable::place(std::uint32_t lane, std::uint32_t model, std::uint32_t stage,
                              std::uint32_t bucket) const {
  if (lane >= lanes_ || model >= models_ || stage >= kStages || bucket >= buckets_) {
    throw std::runtime_error("lane " + std::to_string(lane) + ", model " + std::to_string(model) +
                             ", stage " + std::to_string(stage) + ", bucket " +
                             std::to_string(bucket) + " lies outside the table of graphs");
  }
  const Tables tables{nullptr, nullptr, models_, buckets_};
  return lane * tables.places() + tables.place(model, static_cast<GPUStage>(stage), bucket);
}

void GraphTable::add(std::uint32_t lane, std::uint32_t model, std::uint32_t stage,
                     std::uint32_t bucket, Graph graph, Stream stream) {
  std::uint64_t& exec = execs_[place(lane, model, stage, bucket)];
  const std::string what = std::string(kStageNames[stage]) + " of model " + std::to_string(model) +
                           ", bucket " + std::to_string(bucket);
  if (exec != 0) {
    throw std::runtime_error("lane " + std::to_string(lane) + " has a graph for " + what +
                             " already");
  }
  exec = reinterpret_cast<std::uintptr_t>(instantiate(graph, stream, "the graph for " + what));
}

const std::uint64_t* GraphTable::on_device(std::uint32_t lane) const {
  return device_.data() + place(lane, 0, 0, 0);
}

void GraphTable::copy_to_device(Stream stream) const { device_.fill(execs_, stream); }

}  // namespace crosspool::gpu
