// Measures how fast cores together read memory, with a thread pinned to each:
//   bandwidth BYTES PASSES CORE...
// prints the seconds of each pass. In a pass every thread reads its share of BYTES. Passes walk
// through four times as much memory, on huge pages that the reading thread touched first.
#include <sys/mman.h>

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "floors.h"
#include "pin.h"

namespace {

using crosspool::benchmark::now;
using crosspool::benchmark::pin;

constexpr std::size_t kHuge = std::size_t{2} << 20;
constexpr std::size_t kCopies = 4;

std::byte* touched(std::size_t bytes) {
  void* const memory = std::aligned_alloc(kHuge, (bytes + kHuge - 1) / kHuge * kHuge);
  if (memory == nullptr) {
    std::fprintf(stderr, "no memory\n");
    std::exit(2);
  }
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  return static_cast<std::byte*>(memory);
}

}  // namespace

int main(int count, char** words) {
  if (count < 4) {
    std::fprintf(stderr, "usage: bandwidth BYTES PASSES CORE...\n");
    return 2;
  }
  const std::size_t bytes = std::strtoull(words[1], nullptr, 10);
  const int passes = std::atoi(words[2]);
  const std::ptrdiff_t threads = count - 3;
  const std::size_t share = bytes / static_cast<std::size_t>(threads) / 4096 * 4096;
  std::barrier gate(threads);
  std::vector<double> seconds(static_cast<std::size_t>(passes));
  const auto read = [&](std::ptrdiff_t index) {
    pin(std::atoi(words[3 + index]));
    std::byte* const memory = touched(share * kCopies);
    for (int pass = -1; pass < passes; ++pass) {
      gate.arrive_and_wait();
      const double begin = now();
      const std::size_t copy = static_cast<std::size_t>(pass + 1) % kCopies;
      crosspool::benchmark::read_bytes(memory + copy * share, share);
      gate.arrive_and_wait();
      if (index == 0 && pass >= 0) seconds[static_cast<std::size_t>(pass)] = now() - begin;
    }
    std::free(memory);
  };
  std::vector<std::jthread> others;
  for (std::ptrdiff_t index = 1; index < threads; ++index) others.emplace_back(read, index);
  read(0);
  others.clear();
  for (const double value : seconds) std::printf("%.9f\n", value);
  return 0;
}
