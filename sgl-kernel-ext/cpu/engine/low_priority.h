// The priority of threads that work beside a loop.
#ifndef CROSSPOOL_CPU_ENGINE_LOW_PRIORITY_H
#define CROSSPOOL_CPU_ENGINE_LOW_PRIORITY_H

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace crosspool {

// Requests wait for what such threads do: on a busy core they have a tenth of what others have, and
// not less.
inline constexpr int kLowPriority = 10;

// Lowers the priority of the calling thread for good. Of Linux's threads each has one of its own.
inline void yield_to_others() {
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kLowPriority);
}

}  // namespace crosspool

#endif
