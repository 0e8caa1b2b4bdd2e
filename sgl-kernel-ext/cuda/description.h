// Checks of a loop's description.
#ifndef CROSSPOOL_CUDA_DESCRIPTION_H
#define CROSSPOOL_CUDA_DESCRIPTION_H

#include <string>

#include "loop.h"

namespace crosspool::gpu {

// Returns `description`. Throws std::runtime_error where it contradicts itself.
const GPULoopDescription& checked(const GPULoopDescription& description);

// Names a lane in messages.
std::string lane_name(std::uint32_t lane);

}  // namespace crosspool::gpu

#endif
