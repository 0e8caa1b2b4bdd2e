// How memory goes back to the system beside threads that compute: piece by piece.
#ifndef CROSSPOOL_CPU_ENGINE_GIVING_BACK_H
#define CROSSPOOL_CPU_ENGINE_GIVING_BACK_H

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace crosspool {

// A huge page. While the system takes a piece back, other threads of the process that need memory
// may wait, and on small pages a piece takes a fraction of a millisecond.
inline constexpr std::uint64_t kGiveBackBytes = std::uint64_t{2} << 20;

// Calls give(address, bytes) for one piece after the other, and rest() after each. Ends with the
// first result of `give` that is not 0, and returns it.
template <typename Give, typename Rest>
int give_back_in_pieces(std::byte* begin, std::uint64_t bytes, Give give, Rest rest) {
  for (std::uint64_t offset = 0; offset < bytes; offset += kGiveBackBytes) {
    if (const int error = give(begin + offset, std::min(kGiveBackBytes, bytes - offset))) {
      return error;
    }
    rest();
  }
  return 0;
}

}  // namespace crosspool

#endif
