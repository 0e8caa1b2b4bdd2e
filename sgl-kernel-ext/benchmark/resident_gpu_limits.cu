// Launches from the device: how many one execution may make, what they cost, and whether an exec
// whose last node has raised a flag can be launched again at once.
#include "resident_gpu.h"

namespace crosspool::bench {

namespace {

// In mapped host memory: written once, at the end, since every access crosses the bus.
struct Outcome {
  std::uint32_t launched;
  std::uint32_t error;
  std::uint64_t retries;
  std::uint64_t ns;
};

__device__ std::uint64_t clock_ns() {
  std::uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// As many launches as are wanted, or as succeed.
__global__ void launch_many(const cudaGraphExec_t* execs, std::uint32_t wanted, bool tail,
                            Outcome* outcome) {
  const std::uint64_t begin = clock_ns();
  const cudaStream_t how = tail ? cudaStreamGraphTailLaunch : cudaStreamGraphFireAndForget;
  std::uint32_t launched = 0;
  cudaError_t error = cudaSuccess;
  for (; launched < wanted; ++launched) {
    error = cudaGraphLaunch(execs[launched], how);
    if (error != cudaSuccess) break;
  }
  *outcome = {launched, static_cast<std::uint32_t>(error), 0, clock_ns() - begin};
}

__global__ void raise_flag(volatile std::uint32_t* flag) {
  __threadfence();
  *flag = *flag + 1;
}

// One exec again and again, each time as soon as its last node has raised the flag.
__global__ void launch_again(cudaGraphExec_t exec, volatile std::uint32_t* flag,
                             std::uint32_t wanted, Outcome* outcome) {
  constexpr std::uint64_t kPatienceNs = 100'000'000;
  const std::uint64_t begin = clock_ns();
  std::uint32_t launched = 0;
  std::uint64_t retries = 0;
  cudaError_t error = cudaSuccess;
  while (launched < wanted && clock_ns() - begin < kPatienceNs) {
    error = cudaGraphLaunch(exec, cudaStreamGraphFireAndForget);
    if (error == cudaErrorInvalidValue) {
      ++retries;
      __nanosleep(50);
      continue;
    }
    if (error != cudaSuccess) break;
    ++launched;
    while (*flag < launched && clock_ns() - begin < kPatienceNs) {
    }
  }
  *outcome = {launched, static_cast<std::uint32_t>(error), retries, clock_ns() - begin};
}

cudaGraphExec_t for_device(cudaGraph_t graph, cudaStream_t stream) {
  cudaGraphInstantiateParams parameters{};
  parameters.flags = cudaGraphInstantiateFlagDeviceLaunch | cudaGraphInstantiateFlagUpload;
  parameters.uploadStream = stream;
  cudaGraphExec_t exec = nullptr;
  CUDA(cudaGraphInstantiateWithParams(&exec, graph, &parameters));
  CUDA(cudaStreamSynchronize(stream));
  return exec;
}

// Runs what `launch` puts into the stream as a graph of its own: launches from the device come from
// kernels of graphs alone.
template <class Launch>
Outcome run_as_graph(cudaStream_t stream, Outcome* outcome, Launch launch) {
  *outcome = {};
  cudaGraph_t graph = nullptr;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launch();
  CUDA(cudaGetLastError());
  CUDA(cudaStreamEndCapture(stream, &graph));
  const cudaGraphExec_t exec = for_device(graph, stream);
  CUDA(cudaGraphLaunch(exec, stream));
  CUDA(cudaStreamSynchronize(stream));
  CUDA(cudaGraphExecDestroy(exec));
  CUDA(cudaGraphDestroy(graph));
  return *outcome;
}

}  // namespace

void limits() {
  constexpr std::uint32_t kExecs = 300;
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const cudaGraph_t work = captured_work(0);
  std::vector<cudaGraphExec_t> execs;
  std::size_t free_before = 0, free_after = 0, total = 0;
  CUDA(cudaMemGetInfo(&free_before, &total));
  for (std::uint32_t i = 0; i < kExecs; ++i) execs.push_back(for_device(work, stream));
  CUDA(cudaMemGetInfo(&free_after, &total));
  const double used = static_cast<double>(free_before - free_after);
  row("limits", "device memory of an exec of one kernel", "bytes", {used / kExecs});
  cudaGraphExec_t* table = nullptr;
  CUDA(cudaMalloc(&table, kExecs * sizeof(*table)));
  CUDA(cudaMemcpy(table, execs.data(), kExecs * sizeof(*table), cudaMemcpyHostToDevice));
  Outcome* outcome = nullptr;
  CUDA(cudaHostAlloc(&outcome, sizeof(*outcome), cudaHostAllocMapped));
  for (const bool tail : {false, true}) {
    const std::string kind = tail ? "tail" : "fire and forget";
    const Outcome most = run_as_graph(
        stream, outcome, [&] { launch_many<<<1, 1, 0, stream>>>(table, kExecs, tail, outcome); });
    row("limits", kind + ": launches of one execution", "launches",
        {static_cast<double>(most.launched)}, "\"error\": " + std::to_string(most.error));
    std::vector<double> ns;
    for (int i = 0; i < 20; ++i) {
      ns.push_back(
          run_as_graph(stream, outcome,
                       [&] { launch_many<<<1, 1, 0, stream>>>(table, 100, tail, outcome); })
              .ns /
          100.0);
    }
    row("limits", kind + ": the call", "ns", ns);
  }
  std::uint32_t* flag = nullptr;
  CUDA(cudaMalloc(&flag, sizeof(*flag)));
  CUDA(cudaMemset(flag, 0, sizeof(*flag)));
  cudaGraph_t flagged = nullptr;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  raise_flag<<<1, 1, 0, stream>>>(flag);
  CUDA(cudaStreamEndCapture(stream, &flagged));
  const cudaGraphExec_t again = for_device(flagged, stream);
  const Outcome relaunched = run_as_graph(
      stream, outcome, [&] { launch_again<<<1, 1, 0, stream>>>(again, flag, 100, outcome); });
  const std::string more = "\"retries\": " + std::to_string(relaunched.retries) +
                           ", \"launched\": " + std::to_string(relaunched.launched) +
                           ", \"error\": " + std::to_string(relaunched.error);
  row("limits", "fire and forget: the same exec again behind its flag", "us",
      {relaunched.ns / 1000.0 / std::max(1U, relaunched.launched)}, more);
}

}  // namespace crosspool::bench
