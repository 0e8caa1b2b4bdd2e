// The engine's C face, for crosspool/kernels/engine.py. Functions that can fail return null, and
// crosspool_error() says why, for the calling thread.
#ifndef CROSSPOOL_CPU_ENGINE_ENGINE_H
#define CROSSPOOL_CPU_ENGINE_ENGINE_H

#include <crosspool/command_ring.h>
#include <crosspool/export.h>

#include <cstdint>

#include "../kernels/kernels.h"
#include "expert_pool.h"
#include "loop.h"
#include "spans.h"
#include "team.h"
#include "waking.h"

extern "C" {

CROSSPOOL_API const char* crosspool_error(void);

// Writes sizeof of at most `count` structures that Python mirrors, in the order of MIRRORED in
// engine_structs.py. Returns how many there are.
CROSSPOOL_API std::int32_t crosspool_engine_sizes(std::uint64_t* sizes, std::int32_t count);

// Starts a thread for each core, pinned to it unless it is negative.
CROSSPOOL_API crosspool::Team* crosspool_team_create(const std::int32_t* cores, std::int32_t count);
// Requires that no loop runs on the team.
CROSSPOOL_API void crosspool_team_free(crosspool::Team* team);
// Packs a matrix with the whole team, each thread the panels that it reads later, and sets its
// encoding: compact where the kernels can and the weights allow. Its memory must have room for the
// plain matrix, and no loop may run.
CROSSPOOL_API void crosspool_team_pack(crosspool::Team* team, crosspool::Matrix* matrix,
                                       const crosspool::Source* sources, std::int32_t count);
CROSSPOOL_API void crosspool_team_pack_gated(crosspool::Team* team, crosspool::Matrix* matrix,
                                             const crosspool::Source* gate,
                                             const crosspool::Source* up);
// The same for a quantised matrix, whose codes, scales, group and offset are set already.
CROSSPOOL_API void crosspool_team_pack_grouped(crosspool::Team* team, crosspool::Matrix* matrix,
                                               const crosspool::CodeSource* source);
// Reads spans of a file with the whole team, each thread what it packs otherwise, and sets their
// checksums; no loop may run. Returns 0 or -errno.
CROSSPOOL_API std::int32_t crosspool_team_read(crosspool::Team* team, std::int32_t file,
                                               crosspool::Span* spans, std::int32_t count);
// Sets the checksums of spans from memory, in the calling thread.
CROSSPOOL_API void crosspool_checksums(crosspool::Span* spans, std::int32_t count);

// See ExpertPool. No loop that knows a pool may live longer than the pool.
CROSSPOOL_API crosspool::ExpertPool* crosspool_experts_create(void* memory, std::int64_t bytes,
                                                              const std::int32_t* cores,
                                                              std::int32_t core_count,
                                                              std::int32_t readers,
                                                              std::int32_t models);
CROSSPOOL_API void crosspool_experts_free(crosspool::ExpertPool* pool);
CROSSPOOL_API std::int32_t crosspool_experts_add(crosspool::ExpertPool* pool, std::int32_t model,
                                                 std::int32_t file,
                                                 const crosspool::PooledExpert* experts,
                                                 std::int32_t count);
CROSSPOOL_API void crosspool_experts_remove(crosspool::ExpertPool* pool, std::int32_t model);
CROSSPOOL_API std::int32_t crosspool_experts_failed(crosspool::ExpertPool* pool);
CROSSPOOL_API void crosspool_experts_counters(crosspool::ExpertPool* pool, std::int32_t model,
                                              crosspool::ExpertCounters* counters);

CROSSPOOL_API crosspool::Loop* crosspool_loop_create(crosspool::Team* team,
                                                     const crosspool::LoopDescription* description);
CROSSPOOL_API void crosspool_loop_free(crosspool::Loop* loop);
// Returns 0 when the ring is full.
CROSSPOOL_API std::int32_t crosspool_loop_push(crosspool::Loop* loop,
                                               const crosspool::Command* command);
// Returns 0 when there is no event.
CROSSPOOL_API std::int32_t crosspool_loop_pop(crosspool::Loop* loop, crosspool::Event* event);
CROSSPOOL_API std::int64_t crosspool_loop_last_served(crosspool::Loop* loop);

// See Loop::set_present and read_stages.
CROSSPOOL_API void crosspool_loop_set_present(crosspool::Loop* loop, std::int32_t model,
                                              std::int32_t part, std::int32_t layers);
CROSSPOOL_API std::int32_t crosspool_loop_read(crosspool::Loop* loop,
                                               crosspool::StagedReading* reading);

CROSSPOOL_API void crosspool_loop_trace_start(crosspool::Loop* loop);
// Ends recording; copies at most `room` events and returns their number.
CROSSPOOL_API std::uint64_t crosspool_loop_trace_stop(crosspool::Loop* loop,
                                                      crosspool::TraceEvent* into,
                                                      std::uint64_t room);
}

#endif
