// A thread's sign that it goes on while it computes.
#ifndef CROSSPOOL_CPU_KERNELS_ADVANCE_H
#define CROSSPOOL_CPU_KERNELS_ADVANCE_H

#include <cstdint>

namespace crosspool {

// Has advance() count in `counter` when the calling thread calls it; null, as at first: nowhere.
void count_advances(std::uint64_t* counter);

// Counts. Whatever may take long calls it within: a product after every group of panels and as many
// rows as the second-level cache holds, attention after every block of keys of a KV head.
void advance();

}  // namespace crosspool

#endif
