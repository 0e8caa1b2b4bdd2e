/* The signals of the lane protocol, in memory that two processes share.
 *
 * A signal is a 64-bit sequence number that only grows. Its writer first writes the payload, then
 * stores the next number (release); a reader that loads the number (acquire) sees the payload.
 *
 * A doorbell lets one sleeper wait for any of many signals. Order of publication: payload, signal,
 * ring. Order of waiting: read the doorbell's count, look at the signals, and if none has news,
 * wait with that count; a ring after the count was read ends the wait at once, so none is lost.
 */
#ifndef CROSSPOOL_SIGNAL_H
#define CROSSPOOL_SIGNAL_H

#include <crosspool/export.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Signals are 8-byte aligned, and alone on their cache line. */
CROSSPOOL_API uint64_t crosspool_signal_load(uint64_t* signal);
CROSSPOOL_API void crosspool_signal_store(uint64_t* signal, uint64_t value);

/* All zero at first; alone on its cache line. */
typedef struct crosspool_doorbell {
  uint32_t rings;    /* number of rings, wraps around; the futex word */
  uint32_t sleepers; /* threads that sleep, or are about to */
} crosspool_doorbell;

CROSSPOOL_API uint32_t crosspool_doorbell_rings(crosspool_doorbell* doorbell);
CROSSPOOL_API void crosspool_doorbell_ring(crosspool_doorbell* doorbell);

/* Waits until the count differs from `seen`, `timeout_ns` have passed, or a signal handler ran:
 * spins for at most `spin_ns` (0: not at all), then sleeps. Returns the count as read last; it
 * equals `seen` when nobody rang. */
CROSSPOOL_API uint32_t crosspool_doorbell_wait(crosspool_doorbell* doorbell, uint32_t seen,
                                               int64_t spin_ns, int64_t timeout_ns);

#ifdef __cplusplus
}
#endif

#endif
