/* The KV pool's memory on a CPU: physical chunks that move between a parking range and the models'
 * ranges without a copy (Linux 5.7 or newer, for MREMAP_DONTUNMAP).
 *
 * The parking range holds the whole budget, one slot per chunk, on huge pages where the system has
 * them. A model's range is address space only (PROT_NONE: touching it is a fault). Mapping
 * moves a slot's pages under one chunk of the range; unmapping moves them back into the same slot.
 * Neither ever leaves a hole in the address space that another mmap of this process could take: the
 * side that loses its pages stays mapped (parking: empty; range: PROT_NONE).
 *
 * Functions return 0 or a negative errno. Bytes and chunk_bytes are multiples of 2 MiB.
 */
#ifndef CROSSPOOL_VIRTUAL_MEMORY_H
#define CROSSPOOL_VIRTUAL_MEMORY_H

#include <crosspool/export.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Reserves `bytes` of address space, 2 MiB aligned, inaccessible and without memory. */
CROSSPOOL_API int crosspool_range_reserve(uint64_t bytes, void** address);

/* Reserves a parking range, 2 MiB aligned; its memory comes with the first touch. It is not
 * inherited by forked children, so that a fork never copies the pool. */
CROSSPOOL_API int crosspool_parking_reserve(uint64_t bytes, void** address);

/* Makes a reserved range memory for weights, on huge pages where the system has them; it comes with
 * the first touch. Forked children share it as long as nobody writes. */
CROSSPOOL_API int crosspool_arena_take(void* address, uint64_t bytes);

/* Gives the memory back to the system, as far as no other process shares it; the range stays
 * reserved. A thread of low priority does it piece by piece and rests as long as it works, so that
 * neither threads that need memory wait for it nor those that share its core. */
CROSSPOOL_API int crosspool_arena_drop(void* address, uint64_t bytes);

/* Makes the memory under [address, address + bytes) exist by writing a byte of every page. */
CROSSPOOL_API int crosspool_touch(void* address, uint64_t bytes);

/* Moves parking slot slots[i] under chunk chunks[i] of `range`, for i in order. *done tells how
 * many were moved when an error ends the work; the others are where they were. */
CROSSPOOL_API int crosspool_chunks_map(void* parking, void* range, uint64_t chunk_bytes,
                                       const uint64_t* slots, const uint64_t* chunks,
                                       uint64_t count, uint64_t* done);

/* Moves chunk chunks[i] of `range` back into parking slot slots[i], the one it came from. */
CROSSPOOL_API int crosspool_chunks_unmap(void* parking, void* range, uint64_t chunk_bytes,
                                         const uint64_t* slots, const uint64_t* chunks,
                                         uint64_t count, uint64_t* done);

/* Gives a range or a parking range back to the system, with the memory in it. */
CROSSPOOL_API int crosspool_range_release(void* address, uint64_t bytes);

#ifdef __cplusplus
}
#endif

#endif
