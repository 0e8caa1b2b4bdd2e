// Reads the weights of a model that sleeps, while a loop runs others.
#ifndef CROSSPOOL_CPU_ENGINE_WAKING_H
#define CROSSPOOL_CPU_ENGINE_WAKING_H

#include <cstdint>

#include "loop.h"
#include "spans.h"

namespace crosspool {

// Spans that are read one after another, and what is there when they have been.
// python/crosspool/kernels/engine_structs.py mirrors it, and StagedReading.
struct ReadStage {
  std::int32_t file;
  std::int32_t first;  // of the spans
  std::int32_t count;
  WeightPart part;
  std::int32_t layers;  // for Loop::set_present
};

struct StagedReading {
  const ReadStage* stages;
  Span* spans;
  const std::uint64_t* checksums;  // that the spans must have
  std::int32_t stage_count;
  std::int32_t model;
  std::int32_t event_fd;     // written to a few times a second
  std::int32_t stages_read;  // in: stages that are there already; out
  std::uint64_t bytes;       // out: read so far; any thread may look
  std::int32_t stop;         // in: set to 1 by any thread to end it with -ECANCELED
};

// Reads the stages in order and tells the loop of each. One thread reads, which yields to all
// others; while no step runs, more help it, also on the loop's cores. Returns 0, -errno, or
// -EBADMSG where a checksum is another one.
int read_stages(Loop& loop, StagedReading& reading);

}  // namespace crosspool

#endif
