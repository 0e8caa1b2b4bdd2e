// Runs the rule of an expert pool's memory: reads what happens from the standard input, a line
// each, and prints what the rule decides, for test/kernels/test_expert_memory.py.
//
//   add BYTES           prints the expert's number
//   remove | use | hold | release | drop EXPERT
//   tick
//   half_life TICKS
//   place EXPERT        prints its offset and those that went for it, or "none"
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "../cpu/engine/expert_memory.h"
#include "check.h"

int main(int argc, char** argv) {
  if (argc != 2) fail("usage: expert_memory_check BYTES");
  crosspool::ExpertMemory memory(std::strtoll(argv[1], nullptr, 10));
  std::string what;
  while (std::cin >> what) {
    if (what == "tick") {
      memory.tick();
      continue;
    }
    std::int64_t value = 0;
    if (!(std::cin >> value)) fail("%s wants a number", what.c_str());
    const auto expert = static_cast<std::int32_t>(value);
    if (what == "add") {
      std::printf("%d\n", memory.add(value));
    } else if (what == "remove") {
      memory.remove(expert);
    } else if (what == "use") {
      memory.use(expert);
    } else if (what == "hold") {
      memory.hold(expert);
    } else if (what == "release") {
      memory.release(expert);
    } else if (what == "drop") {
      memory.drop(expert);
    } else if (what == "half_life") {
      memory.set_half_life(static_cast<double>(value));
    } else if (what == "place") {
      std::vector<std::int32_t> gone;
      if (!memory.place(expert, gone)) {
        std::printf("none\n");
        continue;
      }
      std::printf("%lld", static_cast<long long>(memory.offset(expert)));
      for (const std::int32_t other : gone) std::printf(" %d", other);
      std::printf("\n");
    } else {
      fail("%s is unknown", what.c_str());
    }
  }
  return 0;
}
