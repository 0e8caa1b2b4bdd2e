// Which calls of the host wait behind a resident loop: each in a thread of its own under a
// watchdog, with the loop idle and amidst a step. One that does not come back is let go by
// quiescing the loop.
#include <cuda.h>

#include <atomic>
#include <functional>
#include <thread>

#include "resident_gpu.h"

namespace crosspool::bench {

namespace {

constexpr double kPatienceUs = 2e6;
// So that a step takes long, and events are few: a lane waits while their ring is full.
constexpr std::uint32_t kLayers = 4096;

// One for each state of the loop, so that each has a first launch.
template <bool kBusy>
__global__ void never_launched_before(float* x) {
  if (x != nullptr) *x = 1.0F;
}

// A function of the driver, which is not linked.
template <class Function>
Function driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  CUDA(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
  if (result != cudaDriverEntryPointSuccess) CUDA(cudaErrorNotSupported);
  return reinterpret_cast<Function>(found);
}

void drv(CUresult result) {
  if (result == CUDA_SUCCESS) return;
  std::fprintf(stderr, "the driver returned %d\n", static_cast<int>(result));
  std::exit(1);
}

// Virtual memory of one granule.
class Chunk {
 public:
  Chunk() {
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties_.location.id = 0;
    drv(driver<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity")(
        &bytes_, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
    drv(driver<decltype(&cuMemAddressReserve)>("cuMemAddressReserve")(&address_, bytes_, 0, 0, 0));
  }
  void create() { drv(create_(&handle_, bytes_, &properties_, 0)); }
  void map() { drv(map_(address_, bytes_, 0, handle_, 0)); }
  void set_access() {
    const CUmemAccessDesc access{properties_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    drv(set_access_(address_, bytes_, &access, 1));
  }
  void unmap() { drv(unmap_(address_, bytes_)); }
  void release() { drv(release_(handle_)); }

 private:
  CUmemAllocationProp properties_{};
  std::size_t bytes_ = 0;
  CUdeviceptr address_ = 0;
  CUmemGenericAllocationHandle handle_ = 0;
  decltype(&cuMemCreate) create_ = driver<decltype(&cuMemCreate)>("cuMemCreate");
  decltype(&cuMemMap) map_ = driver<decltype(&cuMemMap)>("cuMemMap");
  decltype(&cuMemSetAccess) set_access_ = driver<decltype(&cuMemSetAccess)>("cuMemSetAccess");
  decltype(&cuMemUnmap) unmap_ = driver<decltype(&cuMemUnmap)>("cuMemUnmap");
  decltype(&cuMemRelease) release_ = driver<decltype(&cuMemRelease)>("cuMemRelease");
};

struct Call {
  const char* name;
  std::function<void()> body;
};

// us that the call took; past the patience the loop is quiesced, and started again.
void measure(WorkLoop& loop, const char* state, const Call& call) {
  std::atomic<bool> done{false};
  double us = 0;
  const double start = now_us();
  std::thread caller([&] {
    CUDA(cudaSetDevice(0));
    call.body();
    us = now_us() - start;
    done.store(true);
  });
  while (!done.load() && now_us() - start < kPatienceUs) std::this_thread::yield();
  const bool blocked = !done.load();
  if (blocked && !loop.quiesce(30)) {
    std::fprintf(stderr, "%s: the loop does not leave\n", call.name);
    std::exit(1);
  }
  caller.join();
  if (blocked) loop.start();
  row("blocking", call.name, "us", {us},
      std::string("\"loop\": \"") + state + "\", \"blocked\": " + (blocked ? "true" : "false"));
}

std::vector<Call> calls(bool busy) {
  static Chunk chunk;
  static void *memory = nullptr, *pinned = nullptr, *pooled = nullptr;
  static cudaStream_t stream = nullptr;
  static cudaGraphExec_t exec = nullptr;
  static const cudaGraph_t graph = captured_work(0);
  if (stream == nullptr) CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return {
      {"cuMemCreate", [] { chunk.create(); }},
      {"cuMemMap", [] { chunk.map(); }},
      {"cuMemSetAccess", [] { chunk.set_access(); }},
      {"cuMemUnmap", [] { chunk.unmap(); }},
      {"cuMemRelease", [] { chunk.release(); }},
      {"cudaMalloc", [] { CUDA(cudaMalloc(&memory, 8 << 20)); }},
      {"cudaMemcpy to the device, on a stream",
       [] {
         int value = 0;
         CUDA(cudaMemcpyAsync(memory, &value, sizeof(value), cudaMemcpyHostToDevice, stream));
         CUDA(cudaStreamSynchronize(stream));
       }},
      {"cudaFree", [] { CUDA(cudaFree(memory)); }},
      {"cudaMallocAsync", [] { CUDA(cudaMallocAsync(&pooled, 8 << 20, stream)); }},
      {"cudaFreeAsync", [] { CUDA(cudaFreeAsync(pooled, stream)); }},
      {"cudaHostAlloc", [] { CUDA(cudaHostAlloc(&pinned, 1 << 20, cudaHostAllocMapped)); }},
      {"cudaFreeHost", [] { CUDA(cudaFreeHost(pinned)); }},
      {"cudaGraphInstantiate", [] { CUDA(cudaGraphInstantiate(&exec, graph, 0)); }},
      {"cudaGraphUpload",
       [] {
         CUDA(cudaGraphUpload(exec, stream));
         CUDA(cudaStreamSynchronize(stream));
       }},
      {"cudaGraphLaunch",
       [] {
         CUDA(cudaGraphLaunch(exec, stream));
         CUDA(cudaStreamSynchronize(stream));
       }},
      {"cudaGraphExecDestroy", [] { CUDA(cudaGraphExecDestroy(exec)); }},
      {"the first launch of a kernel",
       [=] {
         (busy ? never_launched_before<true>
               : never_launched_before<false>)<<<1, 1, 0, stream>>>(nullptr);
         CUDA(cudaGetLastError());
         CUDA(cudaStreamSynchronize(stream));
       }},
      {"cudaStreamCreate",
       [] {
         cudaStream_t made = nullptr;
         CUDA(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
       }},
      {"cudaDeviceSynchronize", [] { CUDA(cudaDeviceSynchronize()); }},
  };
}

}  // namespace

void blocking() {
  WorkLoop loop(1, kLayers, 8 << 20);
  for (const bool busy : {false, true}) {
    const std::vector<Call> all = calls(busy);
    loop.start();
    for (const Call& call : all) {
      if (busy) loop.keep_busy();
      measure(loop, busy ? "in a step" : "idle", call);
    }
    if (busy) loop.recall();
    if (!loop.quiesce(30)) return;
  }
  // Leaving the device and coming back, which is what a call that blocks costs.
  std::vector<double> us;
  loop.start();
  for (int i = 0; i < 50; ++i) {
    const double start = now_us();
    if (!loop.quiesce(30)) return;
    loop.start();
    us.push_back(now_us() - start);
  }
  row("blocking", "quiesce and start, idle", "us", us);
}

}  // namespace crosspool::bench
