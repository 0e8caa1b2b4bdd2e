// The mixers of a request's rows: grouped-query attention and multi-head latent attention.
#ifndef CROSSPOOL_CPU_ENGINE_MIXERS_H
#define CROSSPOOL_CPU_ENGINE_MIXERS_H

#include "lane.h"
#include "part.h"

namespace crosspool {

// Take the workspace's normed rows, append their KV to the cache, attend, and return the rows that
// o_proj reads. Every thread calls; all have met at the end.
Rows run_gqa(const Part& part, Lane& lane);
Rows run_mla(const Part& part, Lane& lane);

}  // namespace crosspool

#endif
