/* The C interface of libcrosspool_nvshmem.so, for crosspool/kernels/nvshmem.py: links of the lane
 * protocol (crosspool/lanes.h) between devices that cannot reach each other's memory by loads and
 * stores.
 *
 * A link lies at the same symmetric address on both devices, and each end has a whole copy. The
 * kernels here carry what an end has written, a dispatch or a reply, to the other end, and then set
 * the signal of that copy. Each end's loop (cuda/lane.h) keeps the signals and headers of its own
 * copy, as if the link were one piece of memory, and polls by loads alone. So it must see in order
 * what a peer carries. That holds between GPUs of one NVLink or PCIe domain, and for network cards
 * that keep the order without help of a host. For other cards NVSHMEM's own waits read back through
 * the card, which a polling loop does not.
 *
 * Functions return 0, or what NVSHMEM or CUDA returned. Functions that all PEs call together wait
 * for the device, too, so no loop may be resident on it. */
#ifndef CROSSPOOL_CUDA_NVSHMEM_H
#define CROSSPOOL_CUDA_NVSHMEM_H

#include <crosspool/export.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CROSSPOOL_NVSHMEM_ID_BYTES 128

CROSSPOOL_API int32_t crosspool_nvshmem_unique_id(void* id);
/* Initialises the current device. Returns when all PEs have called it with the same id. Where
 * nvshmemx_init_attr itself fails, it says so on stderr and ends the process. */
CROSSPOOL_API int32_t crosspool_nvshmem_init(int32_t pe, int32_t pes, const void* id);
/* Called by all PEs together. Returns zeroed memory, null where there is no room. */
CROSSPOOL_API void* crosspool_nvshmem_allocate(uint64_t bytes);
/* Called by all PEs together. Frees what was allocated. */
CROSSPOOL_API void crosspool_nvshmem_finalize(void);

typedef struct crosspool_nvshmem_end {
  uint64_t link; /* symmetric address */
  int32_t peer;  /* PE of the other end */
  int32_t reserved;
} crosspool_nvshmem_end;

/* Launches, into a stream under capture, the kernel that ends a kDispatch graph. It carries the
 * rows of the link's dispatch payload to the peer. `words`: device address of the lane's
 * StageWords. */
CROSSPOOL_API int32_t crosspool_nvshmem_dispatch(crosspool_nvshmem_end end, uint64_t words,
                                                 uint64_t epoch, uint32_t model, uint32_t row_bytes,
                                                 void* stream);
/* Launches the kernel that ends an FFN graph of a lane that serves. It carries the rows of the
 * combine payload of the link through which the dispatch came. `ends`: device address of the lane's
 * ends. */
CROSSPOOL_API int32_t crosspool_nvshmem_reply(uint64_t ends, uint64_t payload_bytes, uint64_t words,
                                              void* stream);

#ifdef __cplusplus
}
#endif

#endif
