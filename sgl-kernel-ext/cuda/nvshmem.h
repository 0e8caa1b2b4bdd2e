/* The C face of libcrosspool_nvshmem.so, for crosspool/kernels/nvshmem.py: links of the lane
 * protocol (crosspool/lanes.h) between devices whose memory the other cannot reach by loads and
 * stores.
 *
 * A link lies at the same symmetric address on both devices, and each end has a whole one. The
 * kernels here carry one way what an end has written: the dispatch, or the answer, and then set the
 * signal of the peer's copy. Each end's loop (cuda/lane.h) keeps the signals and headers of its own
 * copy, as if the link were one piece of memory, and polls by loads alone. So what a peer carries
 * must be seen here in its order: that holds between GPUs of one NVLink or PCIe domain, and for
 * network cards that need no help of a host to keep it. For the others NVSHMEM's own waits read
 * back through the card, which a polling loop does not.
 *
 * Functions return 0, or what NVSHMEM or CUDA returned. Those for all PEs together wait for the
 * device too, so no loop is resident on it. */
#ifndef CROSSPOOL_CUDA_NVSHMEM_H
#define CROSSPOOL_CUDA_NVSHMEM_H

#include <crosspool/export.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CROSSPOOL_NVSHMEM_ID_BYTES 128

CROSSPOOL_API int32_t crosspool_nvshmem_unique_id(void* id);
/* On the current device. Returns when all PEs have called it with the same id. Where NVSHMEM itself
 * fails it says so on stderr and ends the process (nvshmemx_init_attr does). */
CROSSPOOL_API int32_t crosspool_nvshmem_init(int32_t pe, int32_t pes, const void* id);
/* By all PEs together. Zeros; null: there is no room. */
CROSSPOOL_API void* crosspool_nvshmem_allocate(uint64_t bytes);
/* By all PEs together. Frees what was allocated. */
CROSSPOOL_API void crosspool_nvshmem_finalize(void);

typedef struct crosspool_nvshmem_end {
  uint64_t link; /* symmetric address */
  int32_t peer;  /* PE of the other end */
  int32_t reserved;
} crosspool_nvshmem_end;

/* Launches the kernel that ends a kDispatch graph, into a stream under capture: carries the rows of
 * the link's dispatch payload to the peer. `words`: device address of the lane's StageWords. */
CROSSPOOL_API int32_t crosspool_nvshmem_dispatch(crosspool_nvshmem_end end, uint64_t words,
                                                 uint64_t epoch, uint32_t model, uint32_t row_bytes,
                                                 void* stream);
/* Launches the kernel that ends an FFN graph of a lane that serves: carries the rows of the combine
 * payload of the link that the dispatch came through. `ends`: device address of the lane's ends. */
CROSSPOOL_API int32_t crosspool_nvshmem_reply(uint64_t ends, uint64_t payload_bytes, uint64_t words,
                                              void* stream);

#ifdef __cplusplus
}
#endif

#endif
