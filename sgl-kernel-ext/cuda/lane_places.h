// Places of all that a lane reads and writes.
#ifndef CROSSPOOL_CUDA_LANE_PLACES_H
#define CROSSPOOL_CUDA_LANE_PLACES_H

#include <crosspool/command_ring.h>
#include <crosspool/lanes.h>

#include "loop.h"
#include "stages.h"

namespace crosspool::gpu {

// Set by the host. Addresses are the device's.
struct LanePlaces {
  Tables tables;
  const std::uint64_t* execs;
  CommandRing* commands;
  EventRing* events;
  LaneStatus* status;
  LaneTrace* trace;
  StageWords* words;
  const std::int32_t* chosen;
  LinkMemory links[kMaxLinks];
  std::uint32_t link_count;
  std::uint32_t index;
  Role role;
  std::uint32_t reserved;
  std::uint64_t epoch;
  std::uint64_t spin_ns;
  std::uint64_t wait_ns;
};

}  // namespace crosspool::gpu

#endif
