// A put with signal inside graphs that the device launches: NVSHMEM's kernels for a dispatch and
// its reply as stages of a resident loop, with one PE that is its own peer.
#include <crosspool/lanes.h>
#include <dlfcn.h>

#include "../cuda/nvshmem.h"
#include "resident_gpu.h"

namespace crosspool::bench {

namespace {

constexpr std::uint32_t kSteps = 1000;
constexpr std::uint32_t kPayload = 8192;

template <class Function>
Function symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(1);
  }
  return reinterpret_cast<Function>(found);
}

void status(std::int32_t value, const char* what) {
  if (value == 0) return;
  std::fprintf(stderr, "%s: status %d\n", what, value);
  std::exit(1);
}

void loop_status(std::int32_t value) {
  if (value >= 0) return;
  std::fprintf(stderr, "%s\n", crosspool_cuda_error());
  std::exit(1);
}

template <class Body>
cudaGraph_t capture(cudaStream_t stream, Body body) {
  cudaGraph_t graph = nullptr;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  body();
  CUDA(cudaStreamEndCapture(stream, &graph));
  return graph;
}

}  // namespace

void exchange(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(1);
  }
#define SYMBOL(name)                                                         \
  const auto name = symbol<decltype(&crosspool_nvshmem_##name)>(library,     \
                                                                "crosspool_" \
                                                                "nvshmem_" #name)
  SYMBOL(unique_id);
  SYMBOL(init);
  SYMBOL(allocate);
  SYMBOL(dispatch);
  SYMBOL(reply);
  SYMBOL(finalize);
#undef SYMBOL
  CUDA(cudaFree(nullptr));
  unsigned char id[CROSSPOOL_NVSHMEM_ID_BYTES];
  status(unique_id(id), "nvshmemx_get_uniqueid");
  status(init(0, 1, id), "nvshmemx_init_attr");
  auto* link = static_cast<unsigned char*>(allocate(sizeof(Link) + 2 * kPayload));
  if (link == nullptr) status(-1, "nvshmem_calloc");

  std::uint8_t* words = nullptr;
  CUDA(cudaMalloc(&words, sizeof(gpu::StageWords)));
  CUDA(cudaMemset(words, 0, sizeof(gpu::StageWords)));
  crosspool_nvshmem_end* ends = nullptr;
  const crosspool_nvshmem_end end{reinterpret_cast<std::uintptr_t>(link), 0, 0};
  CUDA(cudaMalloc(&ends, sizeof(end)));
  CUDA(cudaMemcpy(ends, &end, sizeof(end), cudaMemcpyHostToDevice));

  // The dispatch takes the attention part's place, the reply the FFN part's.
  const std::vector<std::uint8_t> kinds(48);
  const auto layers = static_cast<std::uint32_t>(kinds.size());
  const gpu::ModelDescription model{reinterpret_cast<std::uintptr_t>(kinds.data()), layers, 0, 0,
                                    1};
  const auto at = reinterpret_cast<std::uintptr_t>(words);
  const gpu::LaneDescription lane{at, at, 0, 0, gpu::Role::kAttention};
  const std::uint32_t bucket = 1;
  const gpu::GPULoopDescription description{&model, &lane, &bucket, 1,         1,
                                            1,      0,     1,       1'000'000, 30'000'000'000};
  gpu::GPULoop* loop = crosspool_cuda_loop_create(&description);
  if (loop == nullptr) loop_status(-1);
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto put = [&] { status(dispatch(end, at, 1, 0, kPayload, stream), "dispatch"); };
  const auto send_back = [&] {
    status(reply(reinterpret_cast<std::uintptr_t>(ends), kPayload, at, stream), "reply");
  };
  for (const auto& [stage, graph] :
       {std::pair{gpu::GPUStage::kEmbed, captured_work(0)},
        std::pair{gpu::GPUStage::kAttention, capture(stream, put)},
        std::pair{gpu::GPUStage::kDenseFFN, capture(stream, send_back)}}) {
    loop_status(
        crosspool_cuda_loop_add_graph(loop, 0, 0, static_cast<std::uint32_t>(stage), 0, graph));
  }
  loop_status(crosspool_cuda_loop_start(loop));
  std::vector<double> us;
  for (std::uint32_t i = 1; i <= kSteps; ++i) {
    gpu::GPUStepArguments step{};
    step.step = i;
    step.rows = step.lease = 1;
    const double start = now_us();
    loop_status(crosspool_cuda_loop_push_step(loop, 0, &step));
    Event event{};
    std::int32_t found = 0;
    for (const Patience patience; found == 0; patience.look()) {
      loop_status(found = crosspool_cuda_loop_pop(loop, &event));
    }
    us.push_back((now_us() - start) / layers);
  }
  loop_status(crosspool_cuda_loop_quiesce(loop, 30'000'000'000));
  loop_status(crosspool_cuda_loop_free(loop));
  Link seen{};
  CUDA(cudaMemcpy(&seen, link, sizeof(seen), cudaMemcpyDeviceToHost));
  const std::uint64_t expected = std::uint64_t{kSteps} * layers;
  const bool right = seen.dispatched.sequence == expected && seen.combined.sequence == expected;
  row("exchange", "dispatch and reply to itself", "us per layer", us,
      "\"bytes\": " + std::to_string(kPayload) +
          ", \"signals_right\": " + (right ? "true" : "false"));
  finalize();
}

}  // namespace crosspool::bench
