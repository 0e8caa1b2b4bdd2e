// Packed weights in a file: reading them by the threads that compute with them, and a checksum by
// which a damaged file is told from a whole one.
#ifndef CROSSPOOL_CPU_ENGINE_SPANS_H
#define CROSSPOOL_CPU_ENGINE_SPANS_H

#include <cstddef>
#include <cstdint>

#include "../kernels/kernels.h"

namespace crosspool {

class Team;

// A run of `units` pieces of `unit_bytes`, in memory and at `offset` of a file: the panels of a
// matrix, or the rows of a tensor. python/crosspool/kernels/engine_structs.py mirrors it.
struct Span {
  void* data;
  std::uint64_t offset;
  std::uint64_t checksum;  // written by whoever reads the span
  std::int64_t unit_bytes;
  std::int32_t units;
};

// The part of `units` that a thread packs, reads and computes with: whole pairs.
Range pairs(std::int32_t units, int thread, int threads);

// The sum of a checksum of each unit and its number, so that the order of reading does not matter.
// Any change within 8 bytes of a unit changes it.
std::uint64_t checksum(const Span& span, Range units);

// The number of a span's units that come to at most `bytes`, or one.
std::int32_t units_in(std::int64_t bytes, const Span& span);

// Reads units of a span from a file and adds their checksum to the span's. Returns 0, or -errno;
// -ENODATA where the file ends too early.
int read_units(int file, Span& span, Range units);

// Reads spans from a file, each thread its pairs of units, and sets their checksums. Returns 0, or
// -errno of the first failure; -ENODATA where the file ends too early.
int read_spans(Team& team, int file, Span* spans, std::int32_t count);

}  // namespace crosspool

#endif
