// All connections of a device to other hosts, and how its loop waits for them: the loop itself
// polls the sockets as long as it may spin. Before it sleeps on the device's doorbell, it has the
// sockets watched: a thread rings the doorbell when one can be read or written, once.
#ifndef CROSSPOOL_CPU_LINKS_NETWORK_H
#define CROSSPOOL_CPU_LINKS_NETWORK_H

#include <crosspool/signal.h>

#include <cstdint>
#include <deque>
#include <thread>

#include "connection.h"

namespace crosspool {

// A descriptor of the system that is closed in the end.
class Descriptor {
 public:
  // Throws std::system_error, with errno, for a negative number.
  explicit Descriptor(int number);
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const { return number_; }

 private:
  int number_;
};

class Network {
 public:
  // Starts the thread that watches. Throws std::system_error.
  explicit Network(crosspool_doorbell* doorbell);
  // Ends it, and all connections. No loop may use them any more.
  ~Network();
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  // Adds a connection, which is not there yet; its memory is all zero. Before any loop runs.
  Connection& add(LinkMemory memory, LinkEnd end);
  // See Connection::hand_over; wakes the loop.
  void hand_over(Connection& connection, int socket);
  // Readable when a connection has ended.
  int losses() const { return lost_.number(); }

  // Waits until the doorbell has rung since `*seen`, a message has come, a connection has ended, or
  // `timeout_ns` have passed: spins for at most `spin_ns`, then sleeps. Sets `*seen` to the count
  // of rings, and returns whether there may be news. For the loop's thread.
  bool wait(std::uint32_t* seen, std::int64_t spin_ns, std::int64_t timeout_ns);

 private:
  void watch();
  void arm(Connection& connection);

  crosspool_doorbell* doorbell_;
  Descriptor lost_, stop_, epoll_;
  std::deque<Connection> connections_;
  std::thread watcher_;
};

}  // namespace crosspool

#endif
