// What a loop is told to be.
#ifndef CROSSPOOL_CUDA_DESCRIPTION_H
#define CROSSPOOL_CUDA_DESCRIPTION_H

#include <string>

#include "loop.h"

namespace crosspool::gpu {

// `description`; throws std::runtime_error where it contradicts itself.
const GPULoopDescription& checked(const GPULoopDescription& description);

// In messages.
std::string lane_name(std::uint32_t lane);

}  // namespace crosspool::gpu

#endif
