#include "network.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "../wait.h"

namespace crosspool {

Descriptor::Descriptor(int number) : number_(number) {
  if (number < 0) throw std::system_error(errno, std::generic_category());
}

Descriptor::~Descriptor() { close(number_); }

Network::Network(crosspool_doorbell* doorbell)
    : doorbell_(doorbell),
      lost_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      stop_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      epoll_(epoll_create1(EPOLL_CLOEXEC)) {
  epoll_event event{};
  event.events = EPOLLIN;
  if (epoll_ctl(epoll_.number(), EPOLL_CTL_ADD, stop_.number(), &event) != 0) {
    throw std::system_error(errno, std::generic_category());
  }
  watcher_ = std::thread([this] { watch(); });
}

Network::~Network() {
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(stop_.number(), &one, sizeof(one));
  watcher_.join();
}

Connection& Network::add(LinkMemory memory, LinkEnd end) {
  return connections_.emplace_back(memory, end, lost_.number());
}

void Network::hand_over(Connection& connection, int socket) {
  connection.hand_over(socket);
  crosspool_doorbell_ring(doorbell_);
}

bool Network::wait(std::uint32_t* seen, std::int64_t spin_ns, std::int64_t timeout_ns) {
  const std::uint32_t before = *seen;
  const auto look = [&](bool all) {
    bool news = false;
    for (Connection& connection : connections_) {
      if (!all && !connection.is_expecting()) continue;
      const bool connected = connection.socket() >= 0;
      const bool published = connection.progress();
      news = news || published || (connected && connection.socket() < 0);
    }
    *seen = crosspool_doorbell_rings(doorbell_);
    return news || *seen != before;
  };
  const std::int64_t start = now_ns();
  // The end of a connection on which nothing may come is seen here.
  if (look(true)) return true;
  std::int64_t spent = now_ns() - start;
  while (spent < spin_ns && spent < timeout_ns) {
    if (look(false)) return true;
    relax();
    spent = now_ns() - start;
  }
  if (spent >= timeout_ns) return false;
  for (Connection& connection : connections_) arm(connection);
  if (look(true)) return true;
  *seen = crosspool_doorbell_wait(doorbell_, before, 0, timeout_ns - spent);
  return *seen != before;
}

// Has a socket watched until something happens to it, if it is not watched already.
void Network::arm(Connection& connection) {
  if (connection.socket() < 0) return;
  const bool sends = connection.is_sending();
  if (connection.registered && connection.armed.load(std::memory_order_acquire) && !sends) return;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP | EPOLLONESHOT | (sends ? EPOLLOUT : 0U);
  event.data.ptr = &connection;
  connection.armed.store(true, std::memory_order_release);
  const int operation = connection.registered ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
  connection.registered = epoll_ctl(epoll_.number(), operation, connection.socket(), &event) == 0;
}

void Network::watch() {
  for (;;) {
    epoll_event event{};
    if (epoll_wait(epoll_.number(), &event, 1, -1) <= 0) continue;
    if (event.data.ptr == nullptr) return;
    static_cast<Connection*>(event.data.ptr)->armed.store(false, std::memory_order_release);
    crosspool_doorbell_ring(doorbell_);
  }
}

}  // namespace crosspool
