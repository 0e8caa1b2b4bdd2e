// Parts that the experiments of resident_gpu share: checks, rows of results, a stage's work, a
// loop.
#ifndef CROSSPOOL_BENCHMARK_RESIDENT_GPU_H
#define CROSSPOOL_BENCHMARK_RESIDENT_GPU_H

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../cuda/loop.h"

#define CUDA(call) ::crosspool::bench::check((call), #call)

namespace crosspool::bench {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
  std::exit(1);
}

// A row: {"experiment", "name", "unit", "median", "min", "max", "n", "gpu", and `more`, the inside
// of an object}.
inline void row(const char* experiment, const std::string& name, const char* unit,
                std::vector<double> values, const std::string& more = "") {
  static const std::string gpu = [] {
    cudaDeviceProp properties{};
    CUDA(cudaGetDeviceProperties(&properties, 0));
    return std::string(properties.name);
  }();
  std::sort(values.begin(), values.end());
  std::printf(
      "{\"experiment\": \"%s\", \"name\": \"%s\", \"unit\": \"%s\", \"median\": %.3f, "
      "\"min\": %.3f, \"max\": %.3f, \"n\": %zu, \"gpu\": \"%s\"%s%s}\n",
      experiment, name.c_str(), unit, values[values.size() / 2], values.front(), values.back(),
      values.size(), gpu.c_str(), more.empty() ? "" : ", ", more.c_str());
  std::fflush(stdout);
}

double now_us();

// Bounds a wait for events: a waiting loop calls look(), which ends the program after a minute.
class Patience {
 public:
  void look() const {
    if (now_us() - begin_ < 60e6) return;
    std::fprintf(stderr, "the loop has told nothing for a minute\n");
    std::exit(1);
  }

 private:
  double begin_ = now_us();
};

// The work of one stage: `bytes` read by the whole GPU; 0: a kernel that does nothing.
void add_work(std::size_t bytes, cudaStream_t stream);
// The same work as a graph that is not instantiated.
cudaGraph_t captured_work(std::size_t bytes);

// A loop whose every stage does the same work.
class WorkLoop {
 public:
  WorkLoop(std::uint32_t lanes, std::uint32_t layers, std::size_t bytes);
  ~WorkLoop();
  WorkLoop(WorkLoop&&) = delete;
  WorkLoop& operator=(WorkLoop&&) = delete;

  void start();
  // False: the lanes did not leave within `seconds`.
  bool quiesce(double seconds);
  // A lease of `steps` on every lane; us until all have ended.
  double run(std::uint32_t steps);
  // Keeps a lease under way on the first lane, and takes its events.
  void keep_busy();
  // Ends that lease.
  void recall();

 private:
  void push(std::uint32_t lane, std::uint32_t steps);
  // Takes the events that there are. Returns how many of them end a lease.
  std::uint32_t take();

  gpu::GPULoop* loop_;
  std::uint32_t lanes_;
  std::uint64_t step_ = 0;
  bool busy_ = false;
  std::uint8_t* words_ = nullptr;
  std::int32_t* chosen_ = nullptr;
  std::int32_t* tokens_ = nullptr;
};

// The experiments, by their names on the command line.
void limits();
void lanes();
void blocking();
void exchange(const char* library);

}  // namespace crosspool::bench

#endif
