// What is refused while a resident loop is on the device: whatever CUDA may hold back until the
// device has no work, since a resident loop never ends.
#ifndef CROSSPOOL_CUDA_RESIDENCY_H
#define CROSSPOOL_CUDA_RESIDENCY_H

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace crosspool::gpu {

// Lanes on the device, of all loops of this process, which uses one device.
inline std::atomic<std::uint32_t> resident_lanes{0};

// Throws std::runtime_error while a lane is on the device; `what` is what was about to be done.
inline void not_beside_a_loop(const std::string& what) {
  if (resident_lanes.load() == 0) return;
  throw std::runtime_error(
      what + ": it may wait for ever behind the resident loop that is on the device: quiesce");
}

}  // namespace crosspool::gpu

#endif
