// Measures a hand-over between two devices: a dispatch goes from one pinned thread to another over
// the lane buffers and the doorbells, and a reply of the same size comes back. The payload is
// written and read; both sides spin as loops do while something is in flight.
//
//   hand_over BYTES ROUNDS CORE CORE
//
// Prints a line of JSON: {"bytes": .., "us": [..]}, half of each round trip in microseconds.
#include <crosspool/lanes.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../cpu/wait.h"
#include "../test/bell.h"
#include "pin.h"

using namespace crosspool;
using crosspool::benchmark::pin;

namespace {

constexpr std::int64_t kSpinNs = 500'000;
constexpr int kWarm = 1000;

template <class Ready>
void wait(Bell& bell, Ready&& ready) {
  for (;;) {
    const std::uint32_t seen = crosspool_doorbell_rings(&bell.doorbell);
    if (ready()) return;
    crosspool_doorbell_wait(&bell.doorbell, seen, kSpinNs, kSecond);
  }
}

std::uint64_t sum(const unsigned char* bytes, std::uint32_t count) {
  std::uint64_t total = 0;
  for (std::uint32_t i = 0; i + 8 <= count; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes + i, sizeof(word));
    total += word;
  }
  return total;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const auto bytes = static_cast<std::uint32_t>(std::atoi(argv[1]));
  const int rounds = std::atoi(argv[2]), here = std::atoi(argv[3]), there = std::atoi(argv[4]);
  const SegmentLayout layout{2, 1, 1, bytes, 1};
  std::vector<unsigned char> memory(layout.link_bytes() + kPage);
  auto* const link =
      reinterpret_cast<Link*>(aligned_up(reinterpret_cast<std::uintptr_t>(memory.data()), kPage));
  const LinkMemory view{link, layout.payload_bytes(), 1, bytes};
  Bell attention_bell, ffn_bell;
  std::uint64_t checked = 0;

  std::thread ffn([&] {
    pin(there);
    FFNEnd end(view);
    for (int round = 0; round < rounds + kWarm; ++round) {
      wait(ffn_bell, [&] { return end.poll() == Poll::kDispatch; });
      checked += sum(end.payload(), bytes);
      std::memset(end.partial_sum(), round, bytes);
      end.reply();
      crosspool_doorbell_ring(&attention_bell.doorbell);
    }
  });
  pin(here);
  AttentionEnd end(view);
  std::vector<double> us;
  us.reserve(rounds + kWarm);
  std::uint64_t sent = 0, wrong = 0;
  for (int round = 0; round < rounds + kWarm; ++round) {
    const std::int64_t start = now_ns();
    std::memset(end.payload(), round + 1, bytes);
    end.dispatch({1, 0, 0, 1, bytes});
    crosspool_doorbell_ring(&ffn_bell.doorbell);
    wait(attention_bell, [&] { return end.replied(); });
    const unsigned char* const reply = end.combine();
    const std::uint64_t got = reply == nullptr ? 0 : sum(reply, bytes);
    us.push_back(static_cast<double>(now_ns() - start) / 2e3);
    sent += sum(end.payload(), bytes);
    std::vector<unsigned char> expected(bytes, static_cast<unsigned char>(round));
    wrong += got != sum(expected.data(), bytes);
  }
  ffn.join();
  if (wrong != 0 || sent != checked) {
    std::fprintf(stderr, "hand_over: the payloads do not arrive\n");
    return 1;
  }
  std::printf("{\"bytes\": %u, \"us\": [", bytes);
  for (int i = kWarm; i < rounds + kWarm; ++i) {
    std::printf(i == kWarm ? "%.3f" : ", %.3f", us[i]);
  }
  std::printf("]}\n");
  return 0;
}
