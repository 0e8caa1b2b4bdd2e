// The best rates of one core, which are the floors for kernels.
#ifndef CROSSPOOL_BENCHMARK_FLOORS_H
#define CROSSPOOL_BENCHMARK_FLOORS_H

#include <cstddef>

#include "../cpu/kernels/kernels.h"

namespace crosspool::benchmark {

// Reads `bytes` of memory in four streams with prefetches, the fastest pattern known.
void read_bytes(const std::byte* begin, std::size_t bytes);

// Multiplications and additions per second of one core with everything in registers, in the best
// instruction of the path for the dtype.
double peak_flops(Isa isa, DType dtype);

double now();  // seconds

}  // namespace crosspool::benchmark

#endif
