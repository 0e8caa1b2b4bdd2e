// Measures a meeting of a team when no thread is late, with a thread pinned to each core:
//   barrier ROUNDS CORE...
// Prints a line of JSON: {"us": [..]}, the mean time of each hundred meetings.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../cpu/engine/team.h"
#include "floors.h"

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  constexpr int kMeetings = 100;
  constexpr std::int64_t kPatienceNs = 1'000'000;
  const int rounds = std::atoi(argv[1]);
  std::vector<int> cores;
  for (int i = 2; i < argc; ++i) cores.push_back(std::atoi(argv[i]));
  crosspool::Team team(cores);
  team.set_patience(kPatienceNs);
  std::vector<double> us;
  team.launch([&](int thread) {
    for (int round = 0; round < rounds; ++round) {
      const double begin = crosspool::benchmark::now();
      for (int i = 0; i < kMeetings; ++i) team.meet(thread);
      if (thread == 0) us.push_back((crosspool::benchmark::now() - begin) / kMeetings * 1e6);
    }
  });
  team.wait();
  std::printf("{\"us\": [");
  for (std::size_t i = 0; i < us.size(); ++i) std::printf("%s%.4f", i == 0 ? "" : ", ", us[i]);
  std::printf("]}\n");
}
