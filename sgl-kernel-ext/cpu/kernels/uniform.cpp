// NumPy's Philox4x64-10 (Salmon et al., SC 2011): a random number as a function of two keys.
#include "kernels.h"

namespace crosspool {

double uniform(std::uint64_t seed, std::uint64_t position) {
  std::uint64_t counter[4] = {1, 0, 0, 0};  // NumPy counts before it draws
  std::uint64_t key[2] = {seed, position};
  for (int round = 0; round < 10; ++round) {
    __extension__ using Wide = unsigned __int128;
    const Wide first = static_cast<Wide>(0xD2E7470EE14C6C93U) * counter[0];
    const Wide second = static_cast<Wide>(0xCA5A826395121157U) * counter[2];
    counter[0] = static_cast<std::uint64_t>(second >> 64) ^ counter[1] ^ key[0];
    counter[2] = static_cast<std::uint64_t>(first >> 64) ^ counter[3] ^ key[1];
    counter[1] = static_cast<std::uint64_t>(second);
    counter[3] = static_cast<std::uint64_t>(first);
    key[0] += 0x9E3779B97F4A7C15U;
    key[1] += 0xBB67AE8584CAA73BU;
  }
  return static_cast<double>(counter[0] >> 11) * 0x1p-53;
}

}  // namespace crosspool
