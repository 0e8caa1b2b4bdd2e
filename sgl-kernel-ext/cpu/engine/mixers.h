// What mixes the rows of a request: grouped-query attention, multi-head latent attention.
#ifndef CROSSPOOL_CPU_ENGINE_MIXERS_H
#define CROSSPOOL_CPU_ENGINE_MIXERS_H

#include "lane.h"
#include "part.h"

namespace crosspool {

// From the workspace's normed rows, through the KV cache, to the rows that o_proj reads. Every
// thread calls; they have met at the end.
Rows run_gqa(const Part& part, Lane& lane);
Rows run_mla(const Part& part, Lane& lane);

}  // namespace crosspool

#endif
