// The graphs of the lanes. They are checked, instantiated for launches from the device, and found
// there by model, stage and bucket.
#ifndef CROSSPOOL_CUDA_GRAPH_TABLE_H
#define CROSSPOOL_CUDA_GRAPH_TABLE_H

#include <cstdint>
#include <string>
#include <vector>

#include "calls.h"
#include "memory.h"
#include "stages.h"

namespace crosspool::gpu {

// Instantiates a graph and uploads it in `stream`; the exec may be launched once the stream is
// done. Throws std::runtime_error, which names `what`, for a graph that the device cannot launch.
Exec instantiate(Graph graph, Stream stream, const std::string& what);

class GraphTable {
 public:
  GraphTable(std::uint32_t lanes, std::uint32_t models, std::uint32_t buckets);
  GraphTable(GraphTable&&) = delete;
  GraphTable& operator=(GraphTable&&) = delete;
  ~GraphTable();

  // Throws std::runtime_error.
  void add(std::uint32_t lane, std::uint32_t model, std::uint32_t stage, std::uint32_t bucket,
           Graph graph, Stream stream);

  // Returns a lane's part of the table on the device, which copy_to_device() fills.
  const std::uint64_t* on_device(std::uint32_t lane) const;
  void copy_to_device(Stream stream) const;

 private:
  std::size_t place(std::uint32_t lane, std::uint32_t model, std::uint32_t stage,
                    std::uint32_t bucket) const;

  std::uint32_t lanes_;
  std::uint32_t models_;
  std::uint32_t buckets_;
  std::vector<std::uint64_t> execs_;
  DeviceArray<std::uint64_t> device_;
};

}  // namespace crosspool::gpu

#endif
