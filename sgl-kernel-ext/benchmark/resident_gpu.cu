// First experiments with a GPU-resident loop: rows of JSON on stdout, one figure each.
//
//   resident_gpu limits             launches from the device: their limits, us per launch
//   resident_gpu lanes              us per stage at 1 to 4 lanes, beside launches from the host and
//                                   one graph of everything
//   resident_gpu blocking           which calls of the host wait behind a resident loop
//   resident_gpu exchange LIBRARY   NVSHMEM's dispatch and reply within a loop, one PE;
//                                   LIBRARY: libcrosspool_nvshmem.so
#include <chrono>
#include <cstring>
#include <memory>

#include "resident_gpu.h"

namespace crosspool::bench {

namespace {

constexpr std::uint32_t kMaxLease = 4096;

__global__ void nothing() {}

__global__ void read_all(const float4* data, std::size_t count, float* sink) {
  float sum = 0;
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count; i += stride) {
    const float4 x = data[i];
    sum += x.x + x.y + x.z + x.w;
  }
  if (sum == 1.0F) *sink = sum;  // never: the data are zeros
}

void fail() {
  std::fprintf(stderr, "%s\n", crosspool_cuda_error());
  std::exit(1);
}

}  // namespace

double now_us() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

void add_work(std::size_t bytes, cudaStream_t stream) {
  if (bytes == 0) {
    nothing<<<1, 32, 0, stream>>>();
    return CUDA(cudaGetLastError());
  }
  static void* data = nullptr;
  static float* sink = nullptr;
  constexpr std::size_t kLargest = 256 << 20;
  if (data == nullptr) {
    CUDA(cudaMalloc(&data, kLargest));
    CUDA(cudaMemset(data, 0, kLargest));
    CUDA(cudaMalloc(&sink, sizeof(float)));
    CUDA(cudaDeviceSynchronize());
  }
  int processors = 0;
  CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  read_all<<<4 * processors, 512, 0, stream>>>(static_cast<const float4*>(data),
                                               std::min(bytes, kLargest) / sizeof(float4), sink);
  CUDA(cudaGetLastError());
}

cudaGraph_t captured_work(std::size_t bytes) {
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  add_work(bytes, stream);  // loads the kernel, and allocates
  CUDA(cudaStreamSynchronize(stream));
  cudaGraph_t graph = nullptr;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  add_work(bytes, stream);
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaStreamDestroy(stream));
  return graph;
}

WorkLoop::WorkLoop(std::uint32_t lanes, std::uint32_t layers, std::size_t bytes) : lanes_(lanes) {
  CUDA(cudaMalloc(&words_, sizeof(gpu::StageWords) * lanes));
  CUDA(cudaMalloc(&chosen_, sizeof(std::int32_t) * lanes));
  CUDA(cudaMemset(chosen_, 0, sizeof(std::int32_t) * lanes));
  CUDA(cudaHostAlloc(&tokens_, sizeof(std::int32_t) * kMaxLease * lanes, cudaHostAllocMapped));
  const std::vector<std::uint8_t> kinds(layers);
  const gpu::ModelDescription model{reinterpret_cast<std::uintptr_t>(kinds.data()), layers, 0, 0,
                                    1};
  std::vector<gpu::LaneDescription> places(lanes);
  for (std::uint32_t i = 0; i < lanes; ++i) {
    places[i].words = reinterpret_cast<std::uintptr_t>(words_) + i * sizeof(gpu::StageWords);
    places[i].chosen = reinterpret_cast<std::uintptr_t>(chosen_ + i);
  }
  const std::uint32_t bucket = 1;
  const gpu::GPULoopDescription description{&model, places.data(), &bucket,       1, lanes, 1, 0,
                                            1,      1'000'000,     30'000'000'000};
  loop_ = crosspool_cuda_loop_create(&description);
  if (loop_ == nullptr) fail();
  for (std::uint32_t i = 0; i < lanes; ++i) {
    for (const gpu::GPUStage stage :
         {gpu::GPUStage::kEmbed, gpu::GPUStage::kFeed, gpu::GPUStage::kAttention,
          gpu::GPUStage::kDenseFFN, gpu::GPUStage::kHead}) {
      const cudaGraph_t graph = captured_work(bytes);
      const auto number = static_cast<std::uint32_t>(stage);
      if (crosspool_cuda_loop_add_graph(loop_, i, 0, number, 0, graph) < 0) fail();
      CUDA(cudaGraphDestroy(graph));
    }
  }
}

WorkLoop::~WorkLoop() {
  if (!quiesce(30) || crosspool_cuda_loop_free(loop_) < 0) fail();
  CUDA(cudaFree(words_));
  CUDA(cudaFree(chosen_));
  CUDA(cudaFreeHost(tokens_));
}

void WorkLoop::start() {
  if (crosspool_cuda_loop_start(loop_) < 0) fail();
}

bool WorkLoop::quiesce(double seconds) {
  return crosspool_cuda_loop_quiesce(loop_, static_cast<std::int64_t>(seconds * 1e9)) == 0;
}

void WorkLoop::push(std::uint32_t lane, std::uint32_t steps) {
  gpu::GPUStepArguments step{};
  step.step = ++step_;
  step.rows = step.wanted = 1;
  step.lease = std::min(steps, kMaxLease);
  step.tokens = reinterpret_cast<std::uintptr_t>(tokens_ + std::size_t{kMaxLease} * lane);
  if (crosspool_cuda_loop_push_step(loop_, lane, &step) != 1) fail();
}

std::uint32_t WorkLoop::take() {
  std::uint32_t ended = 0;
  for (;;) {
    Event event{};
    const std::int32_t found = crosspool_cuda_loop_pop(loop_, &event);
    if (found < 0) fail();
    if (found == 0) return ended;
    if (event.kind == EventKind::kDone) ++ended;
  }
}

double WorkLoop::run(std::uint32_t steps) {
  const double start = now_us();
  for (std::uint32_t lane = 0; lane < lanes_; ++lane) push(lane, steps);
  const Patience patience;
  for (std::uint32_t ended = 0; ended < lanes_; patience.look()) ended += take();
  return now_us() - start;
}

void WorkLoop::keep_busy() {
  if (take() != 0) busy_ = false;
  if (!busy_) push(0, kMaxLease);
  busy_ = true;
}

void WorkLoop::recall() {
  const Command command{CommandKind::kRecall, 0, step_, 0, 0};
  if (crosspool_cuda_loop_push(loop_, 0, &command) != 1) fail();
  for (const Patience patience; busy_; patience.look()) busy_ = take() == 0;
}

}  // namespace crosspool::bench

int main(int count, char** arguments) {
  using namespace crosspool::bench;
  // Before CUDA starts: a stream that shares its connection with a lane's may wait for ever.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "limits") {
    limits();
  } else if (what == "lanes") {
    lanes();
  } else if (what == "blocking") {
    blocking();
  } else if (what == "exchange" && count > 2) {
    exchange(arguments[2]);
  } else {
    std::fprintf(stderr, "usage: %s limits | lanes | blocking | exchange LIBRARY\n", arguments[0]);
    return 2;
  }
  return 0;
}
