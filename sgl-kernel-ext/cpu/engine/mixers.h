// The mixers of a request's rows: grouped-query attention, multi-head latent attention, and gated
// delta nets.
#ifndef CROSSPOOL_CPU_ENGINE_MIXERS_H
#define CROSSPOOL_CPU_ENGINE_MIXERS_H

#include "lane.h"
#include "part.h"

namespace crosspool {

// Take the workspace's normed rows, append their KV to the cache, attend, and return the rows that
// o_proj reads. Every thread calls; all have met at the end.
Rows run_gqa(const Part& part, Lane& lane);
Rows run_mla(const Part& part, Lane& lane);

// Takes the workspace's normed rows, moves the requests' state on, and returns the rows that o_proj
// reads. Every thread calls; all have met at the end.
Rows run_delta_net(const Part& part, Lane& lane);

}  // namespace crosspool

#endif
