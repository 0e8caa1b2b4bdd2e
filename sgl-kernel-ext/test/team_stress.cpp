// A team meets many times. Writes of every thread before a meeting must be visible to all after it,
// and thread 0 must be alone in between. Also prints how long a meeting takes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../cpu/engine/team.h"
#include "check.h"

namespace {

void meet_often(int threads, int rounds, std::int64_t patience) {
  crosspool::Team team(std::vector<int>(threads, -1));
  team.set_patience(patience);
  std::vector<std::uint64_t> own(static_cast<std::size_t>(threads) * 8);
  std::uint64_t sum = 0;
  const std::int64_t start = crosspool::now_ns();
  for (int job = 0; job < 3; ++job) {
    team.launch([&](int thread) {
      for (int round = 1; round <= rounds; ++round) {
        own[thread * 8] = static_cast<std::uint64_t>(round) * (thread + 1);
        team.meet(thread, [&] {
          sum = 0;
          for (int other = 0; other < threads; ++other) sum += own[other * 8];
        });
        if (sum != static_cast<std::uint64_t>(round) * threads * (threads + 1) / 2) {
          fail("team_stress: thread %d of %d saw a stale sum in round %d", thread, threads, round);
        }
        team.meet(thread);
      }
    });
    team.wait();
  }
  const std::int64_t ns = (crosspool::now_ns() - start) / (6 * rounds);
  std::printf("%d threads, patience %lld ns: %lld ns a meeting\n", threads,
              static_cast<long long>(patience), static_cast<long long>(ns));
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 2000;
  for (const int threads : {1, 2, 3, 20}) {
    for (const std::int64_t patience : {0, 20'000}) meet_often(threads, rounds, patience);
  }
  return 0;
}
