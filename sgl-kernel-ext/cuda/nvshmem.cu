// Dispatches and replies by NVSHMEM: header, fence, then payload with signal, each by one block.
#include <crosspool/lanes.h>
#include <cuda_runtime.h>
#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstring>

#include "nvshmem.h"
#include "stages.h"

namespace crosspool::gpu {

namespace {

constexpr int kThreads = 512;

static_assert(sizeof(nvshmemx_uniqueid_t) == CROSSPOOL_NVSHMEM_ID_BYTES);

// The memory of a link of which only the address, and perhaps the payload's size, is known.
__device__ LinkMemory memory_of(Link* link, std::uint64_t payload_bytes = 0) {
  return {link, payload_bytes, 0, 0};
}

// The signal that the peer polls must be set last. A put with signal orders only its own payload,
// so the header's put is fenced. The whole block calls it; its threads have met since `header` was
// written, and meet at the end of a block's put.
__device__ void carry(void* header, std::size_t header_bytes, unsigned char* payload,
                      std::size_t bytes, Signal* signal, std::uint64_t sequence, int peer) {
  nvshmemx_putmem_nbi_block(header, header, header_bytes, peer);
  if (threadIdx.x == 0) nvshmem_fence();
  __syncthreads();
  nvshmemx_putmem_signal_block(payload, payload, bytes, &signal->sequence, sequence,
                               NVSHMEM_SIGNAL_SET, peer);
}

// The signal of its own copy still has the number of the previous dispatch: the scheduler sets it
// later.
__global__ void __launch_bounds__(kThreads)
    dispatch(Link* link, const StageWords* words, std::uint64_t epoch, std::uint32_t model,
             std::uint32_t row_bytes, int peer) {
  const auto rows = static_cast<std::uint32_t>(words->rows);
  if (threadIdx.x == 0) {
    link->dispatch = {epoch, model, static_cast<std::uint32_t>(words->layer), rows, row_bytes};
  }
  __syncthreads();
  carry(&link->dispatch, sizeof(link->dispatch), memory_of(link).dispatch_payload(),
        std::size_t{rows} * row_bytes, &link->dispatched, link->dispatched.sequence + 1, peer);
}

__global__ void __launch_bounds__(kThreads)
    reply(const crosspool_nvshmem_end* ends, std::uint64_t payload_bytes, const StageWords* words) {
  const crosspool_nvshmem_end end = ends[words->link];
  Link* link = reinterpret_cast<Link*>(end.link);
  const DispatchHeader asked = link->dispatch;
  if (threadIdx.x == 0) link->combine = {asked.epoch, asked.rows, asked.row_bytes};
  __syncthreads();
  carry(&link->combine, sizeof(link->combine), memory_of(link, payload_bytes).combine_payload(),
        std::size_t{asked.rows} * asked.row_bytes, &link->combined, link->dispatched.sequence,
        end.peer);
}

}  // namespace

}  // namespace crosspool::gpu

using namespace crosspool;
using namespace crosspool::gpu;

std::int32_t crosspool_nvshmem_unique_id(void* id) {
  nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
  const int status = nvshmemx_get_uniqueid(&made);
  std::memcpy(id, &made, sizeof(made));
  return status;
}

std::int32_t crosspool_nvshmem_init(std::int32_t pe, std::int32_t pes, const void* id) {
  nvshmemx_uniqueid_t given;
  std::memcpy(&given, id, sizeof(given));
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  const int status = nvshmemx_set_attr_uniqueid_args(pe, pes, &given, &attributes);
  return status != 0 ? status : nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
}

void* crosspool_nvshmem_allocate(std::uint64_t bytes) { return nvshmem_calloc(1, bytes); }

void crosspool_nvshmem_finalize() { nvshmem_finalize(); }

std::int32_t crosspool_nvshmem_dispatch(crosspool_nvshmem_end end, std::uint64_t words,
                                        std::uint64_t epoch, std::uint32_t model,
                                        std::uint32_t row_bytes, void* stream) {
  dispatch<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<Link*>(end.link), reinterpret_cast<const StageWords*>(words), epoch, model,
      row_bytes, end.peer);
  return cudaGetLastError();
}

std::int32_t crosspool_nvshmem_reply(std::uint64_t ends, std::uint64_t payload_bytes,
                                     std::uint64_t words, void* stream) {
  reply<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const crosspool_nvshmem_end*>(ends), payload_bytes,
      reinterpret_cast<const StageWords*>(words));
  return cudaGetLastError();
}
