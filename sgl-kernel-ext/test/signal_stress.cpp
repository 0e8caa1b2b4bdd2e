// Two threads exchange payloads over signals and doorbells, as the lane protocol does. No wake-up
// may be lost (a wait that times out is a failure); ThreadSanitizer checks that publication orders
// the payload.
#include <crosspool/lanes.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "bell.h"
#include "check.h"

namespace {

constexpr int kLanes = 2;
constexpr int kWords = 64;
constexpr std::int64_t kTimeoutNs = 20'000'000'000;

struct StressedLane {
  crosspool::Signal dispatched{};
  crosspool::Signal combined{};
  std::array<std::uint64_t, kWords> request{};
  std::array<std::uint64_t, kWords> reply{};
};

std::array<StressedLane, kLanes> lanes;
Bell attention_bell;
Bell ffn_bell;

// Waits for the next ring after `seen`; fails when the rank sleeps through it.
std::uint32_t wait(Bell& bell, std::uint32_t seen, std::int64_t spin_ns) {
  const std::uint32_t rings = crosspool_doorbell_wait(&bell.doorbell, seen, spin_ns, kTimeoutNs);
  if (rings == seen) fail("signal_stress: lost wake-up: a wait timed out");
  return rings;
}

void ffn_rank(std::uint64_t rounds, std::int64_t spin_ns) {
  std::array<std::uint64_t, kLanes> replied{};
  std::uint32_t seen = 0;
  for (std::uint64_t left = rounds * kLanes; left > 0;) {
    bool news = false;
    for (int i = 0; i < kLanes; ++i) {
      StressedLane& lane = lanes[i];
      const std::uint64_t sequence = crosspool_signal_load(&lane.dispatched.sequence);
      if (sequence == replied[i]) continue;
      if (sequence != replied[i] + 1) fail("signal_stress: more than one dispatch outstanding");
      for (int word = 0; word < kWords; ++word) {
        if (lane.request[word] != sequence * kWords + word) fail("signal_stress: torn dispatch");
        lane.reply[word] = ~lane.request[word];
      }
      replied[i] = sequence;
      crosspool_signal_store(&lane.combined.sequence, sequence);
      crosspool_doorbell_ring(&attention_bell.doorbell);
      news = true;
      --left;
    }
    if (!news && left > 0) seen = wait(ffn_bell, seen, spin_ns);
  }
}

void attention_rank(std::uint64_t rounds, std::int64_t spin_ns) {
  std::array<std::uint64_t, kLanes> sent{};
  std::uint32_t seen = 0;
  int running = kLanes;
  for (bool first = true; running > 0; first = false) {
    bool news = false;
    for (int i = 0; i < kLanes; ++i) {
      StressedLane& lane = lanes[i];
      if (sent[i] > rounds) continue;
      if (!first) {
        if (crosspool_signal_load(&lane.combined.sequence) != sent[i]) continue;
        for (int word = 0; word < kWords; ++word) {
          if (lane.reply[word] != ~(sent[i] * kWords + word)) fail("signal_stress: torn combine");
        }
      }
      news = true;
      if (++sent[i] > rounds) {
        --running;
        continue;
      }
      for (int word = 0; word < kWords; ++word) lane.request[word] = sent[i] * kWords + word;
      crosspool_signal_store(&lane.dispatched.sequence, sent[i]);
      crosspool_doorbell_ring(&ffn_bell.doorbell);
    }
    if (!news) seen = wait(attention_bell, seen, spin_ns);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  const std::int64_t spin_ns = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 0;
  std::thread ffn(ffn_rank, rounds, spin_ns);
  attention_rank(rounds, spin_ns);
  ffn.join();
  std::printf("%llu round trips\n", static_cast<unsigned long long>(rounds * kLanes));
  return 0;
}
