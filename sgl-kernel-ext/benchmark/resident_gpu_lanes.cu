// us per stage: a resident loop of 1 to 4 lanes, launches of the same graphs from the host, and one
// graph of the whole step.
#include <memory>

#include "resident_gpu.h"

namespace crosspool::bench {

namespace {

constexpr std::uint32_t kLayers = 48;
constexpr std::uint32_t kStagesOfStep = 2 * kLayers + 2;
constexpr std::uint32_t kLease = 100;
constexpr int kRepeats = 5;

std::string parameters(std::size_t bytes, std::uint32_t lanes) {
  return "\"bytes\": " + std::to_string(bytes) + ", \"lanes\": " + std::to_string(lanes);
}

void resident(std::size_t bytes, std::uint32_t lanes) {
  WorkLoop loop(lanes, kLayers, bytes);
  loop.start();
  loop.run(10);
  std::vector<double> us;
  for (int i = 0; i < kRepeats; ++i) us.push_back(loop.run(kLease) / kLease / kStagesOfStep);
  // Of all lanes' stages together: us[...] / lanes.
  row("lanes", "resident", "us per stage of each lane", us, parameters(bytes, lanes));
}

// One launch of the host per stage; then all stages of a step in one graph.
void from_host(std::size_t bytes) {
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const cudaGraph_t one = captured_work(bytes);
  cudaGraph_t whole = nullptr;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (std::uint32_t i = 0; i < kStagesOfStep; ++i) add_work(bytes, stream);
  CUDA(cudaStreamEndCapture(stream, &whole));
  for (const bool as_one : {false, true}) {
    cudaGraphExec_t exec = nullptr;
    CUDA(cudaGraphInstantiate(&exec, as_one ? whole : one, 0));
    const std::uint32_t launches = as_one ? 1 : kStagesOfStep;
    std::vector<double> us;
    for (int i = -1; i < kRepeats; ++i) {
      const double start = now_us();
      for (std::uint32_t step = 0; step < kLease; ++step) {
        for (std::uint32_t n = 0; n < launches; ++n) CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaStreamSynchronize(stream));  // the host wants the tokens
      }
      if (i >= 0) us.push_back((now_us() - start) / kLease / kStagesOfStep);
    }
    row("lanes", as_one ? "one graph of the step" : "launched from the host", "us per stage", us,
        parameters(bytes, 1));
    CUDA(cudaGraphExecDestroy(exec));
  }
}

}  // namespace

void lanes() {
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{8} << 20, std::size_t{64} << 20}) {
    from_host(bytes);
    for (std::uint32_t count = 1; count <= 4; ++count) resident(bytes, count);
  }
}

}  // namespace crosspool::bench
