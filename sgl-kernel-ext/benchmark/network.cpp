// Measures a round trip between two devices in three ways, side by side: a plain TCP ping-pong over
// loopback whose ends poll their sockets, a link over such a connection, and a link in shared
// memory. A dispatch is written on one pinned thread and read on another, and a reply of the same
// size comes back; everybody spins as loops do while something is in flight.
//
//   network BYTES ROUNDS CORE CORE
//
// The three take turns every hundred rounds. Prints a line of JSON: {"bytes": .., "tcp": [..],
// "link": [..], "memory": [..]}, round trips in microseconds.
#include "../cpu/links/network.h"

#include <crosspool/lanes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "../cpu/wait.h"
#include "../test/bell.h"
#include "pin.h"

using namespace crosspool;
using crosspool::benchmark::pin;

namespace {

constexpr std::int64_t kSpinNs = 500'000;
constexpr int kWarm = 200, kTurn = 100;

void require(bool holds, const char* what) {
  if (holds) return;
  std::perror(what);
  std::exit(1);
}

std::pair<int, int> tcp_pair() {
  const int server = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  auto* const plain = reinterpret_cast<sockaddr*>(&address);
  socklen_t size = sizeof(address);
  require(bind(server, plain, size) == 0 && listen(server, 1) == 0, "listen");
  require(getsockname(server, plain, &size) == 0, "getsockname");
  const int here = socket(AF_INET, SOCK_STREAM, 0);
  require(connect(here, plain, size) == 0, "connect");
  const int there = accept(server, nullptr, nullptr);
  require(there >= 0, "accept");
  close(server);
  const int yes = 1;
  for (const int end : {here, there}) {
    require(setsockopt(end, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes)) == 0, "TCP_NODELAY");
  }
  return {here, there};
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

// The sum of `bytes` bytes of one value.
std::uint64_t sum_of(int value, std::uint32_t bytes) {
  return bytes / 8 * (0x0101010101010101ULL * static_cast<unsigned char>(value));
}

// What is measured: both threads' share of a round trip.
class Way {
 public:
  virtual ~Way() = default;
  // Writes rows of the value, sends them, and returns the sum of what comes back.
  virtual std::uint64_t ask(int value) = 0;
  // Reads what comes, and sends rows of the value back; returns the sum.
  virtual std::uint64_t answer(int value) = 0;
};

class PlainTCP : public Way {
 public:
  explicit PlainTCP(std::uint32_t bytes) : ends_(tcp_pair()), here_(bytes), there_(bytes) {}
  ~PlainTCP() override {
    close(ends_.first);
    close(ends_.second);
  }
  std::uint64_t ask(int value) override {
    std::memset(here_.data(), value, here_.size());
    send_all(ends_.first, here_);
    receive_all(ends_.first, here_);
    return sum(here_.data(), static_cast<std::uint32_t>(here_.size()));
  }
  std::uint64_t answer(int value) override {
    receive_all(ends_.second, there_);
    const std::uint64_t found = sum(there_.data(), static_cast<std::uint32_t>(there_.size()));
    std::memset(there_.data(), value, there_.size());
    send_all(ends_.second, there_);
    return found;
  }

 private:
  template <class Move>
  static void all(std::vector<unsigned char>& bytes, Move&& move) {
    for (std::size_t done = 0; done < bytes.size();) {
      const ssize_t moved = move(bytes.data() + done, bytes.size() - done);
      require(moved > 0 || errno == EAGAIN, "plain TCP");
      if (moved > 0) done += static_cast<std::size_t>(moved);
    }
  }
  static void send_all(int end, std::vector<unsigned char>& bytes) {
    all(bytes, [&](void* at, std::size_t n) { return send(end, at, n, MSG_DONTWAIT); });
  }
  static void receive_all(int end, std::vector<unsigned char>& bytes) {
    all(bytes, [&](void* at, std::size_t n) { return recv(end, at, n, MSG_DONTWAIT); });
  }

  std::pair<int, int> ends_;
  std::vector<unsigned char> here_, there_;
};

// Memory of a link, on pages of its own.
class OwnMemory {
 public:
  explicit OwnMemory(std::uint32_t bytes)
      : layout_{2, 1, 1, bytes, 1}, memory_(layout_.link_bytes() + kPage) {}
  LinkMemory view() {
    auto* const base = reinterpret_cast<void*>(
        aligned_up(reinterpret_cast<std::uintptr_t>(memory_.data()), kPage));
    return {static_cast<Link*>(base), layout_.payload_bytes(), 1, layout_.max_row_bytes};
  }

 private:
  SegmentLayout layout_;
  std::vector<unsigned char> memory_;
};

// A link, whose ends wait and tell each other in some way.
class LinkWay : public Way {
 public:
  LinkWay(LinkMemory here, LinkMemory there, std::uint32_t bytes)
      : attention_(here), ffn_(there), bytes_(bytes) {}
  std::uint64_t ask(int value) override {
    wait(true, [&] { return attention_.free(); });
    attention_.take_up();
    std::memset(attention_.payload(), value, bytes_);
    attention_.dispatch({1, 0, 0, 1, bytes_});
    tell(true);
    wait(true, [&] { return attention_.replied(); });
    const unsigned char* const reply = attention_.combine();
    return reply == nullptr ? 0 : sum(reply, bytes_);
  }
  std::uint64_t answer(int value) override {
    wait(false, [&] { return ffn_.poll() == Poll::kDispatch; });
    const std::uint64_t found = sum(ffn_.payload(), bytes_);
    std::memset(ffn_.partial_sum(), value, bytes_);
    ffn_.reply();
    tell(false);
    return found;
  }

 protected:
  virtual void look(bool attention) = 0;
  virtual void tell(bool attention) = 0;
  virtual void sleep(bool attention, std::uint32_t seen) = 0;
  Bell bells_[2];  // of the FFN rank's device, then of the attention rank's

 private:
  template <class Ready>
  void wait(bool attention, Ready&& ready) {
    for (;;) {
      const std::uint32_t seen = crosspool_doorbell_rings(&bells_[attention].doorbell);
      look(attention);
      if (ready()) return;
      sleep(attention, seen);
    }
  }

  AttentionEnd attention_;
  FFNEnd ffn_;
  std::uint32_t bytes_;
};

struct OneMemory {
  explicit OneMemory(std::uint32_t bytes) : shared(bytes) {}
  OwnMemory shared;
};

class SharedMemory : private OneMemory, public LinkWay {
 public:
  explicit SharedMemory(std::uint32_t bytes)
      : OneMemory(bytes), LinkWay(shared.view(), shared.view(), bytes) {}

 protected:
  void look(bool) override {}
  void tell(bool attention) override { crosspool_doorbell_ring(&bells_[!attention].doorbell); }
  void sleep(bool attention, std::uint32_t seen) override {
    crosspool_doorbell_wait(&bells_[attention].doorbell, seen, kSpinNs, kSecond);
  }
};

struct TwoMemories {
  explicit TwoMemories(std::uint32_t bytes) : here(bytes), there(bytes) {}
  OwnMemory here, there;
};

class OverTCP : private TwoMemories, public LinkWay {
 public:
  explicit OverTCP(std::uint32_t bytes)
      : TwoMemories(bytes),
        LinkWay(here.view(), there.view(), bytes),
        networks_{Network(&bells_[0].doorbell), Network(&bells_[1].doorbell)},
        connections_{&networks_[0].add(there.view(), LinkEnd::kFFN),
                     &networks_[1].add(here.view(), LinkEnd::kAttention)} {
    const auto [near, far] = tcp_pair();
    networks_[1].hand_over(*connections_[1], near);
    networks_[0].hand_over(*connections_[0], far);
  }

 protected:
  void look(bool attention) override { connections_[attention]->progress(); }
  void tell(bool attention) override { connections_[attention]->publish(); }
  void sleep(bool attention, std::uint32_t seen) override {
    networks_[attention].wait(&seen, kSpinNs, kSecond);
  }

 private:
  std::array<Network, 2> networks_;
  std::array<Connection*, 2> connections_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const auto bytes = static_cast<std::uint32_t>(std::atoi(argv[1]));
  const int rounds = std::atoi(argv[2]), here = std::atoi(argv[3]), there = std::atoi(argv[4]);
  PlainTCP tcp(bytes);
  OverTCP link(bytes);
  SharedMemory memory(bytes);
  const std::array<Way*, 3> ways{&tcp, &link, &memory};
  const char* const names[] = {"tcp", "link", "memory"};
  std::array<std::vector<double>, 3> us;
  // Both threads go through the same turns: a hundred rounds of each way, again and again.
  const auto turns = [&](auto&& round) {
    for (int first = -kWarm; first < rounds; first += kTurn) {
      for (std::size_t way = 0; way < ways.size(); ++way) {
        for (int i = first; i < std::min(first + kTurn, rounds); ++i) round(way, i);
      }
    }
  };
  std::uint64_t wrong = 0, wrong_there = 0;
  std::thread answering([&] {
    pin(there);
    turns([&](std::size_t way, int i) {
      wrong_there += ways[way]->answer(i + 1) != sum_of(i, bytes);
    });
  });
  pin(here);
  turns([&](std::size_t way, int i) {
    const std::int64_t start = now_ns();
    const std::uint64_t found = ways[way]->ask(i);
    const std::int64_t end = now_ns();
    wrong += found != sum_of(i + 1, bytes);
    if (i >= 0) us[way].push_back(static_cast<double>(end - start) / 1e3);
  });
  answering.join();
  if (wrong + wrong_there != 0) {
    std::fprintf(stderr, "network: the payloads do not arrive\n");
    return 1;
  }
  std::printf("{\"bytes\": %u", bytes);
  for (std::size_t way = 0; way < ways.size(); ++way) {
    std::printf(", \"%s\": [", names[way]);
    for (std::size_t i = 0; i < us[way].size(); ++i) {
      std::printf(i == 0 ? "%.3f" : ", %.3f", us[way][i]);
    }
    std::printf("]");
  }
  std::printf("}\n");
  return 0;
}
