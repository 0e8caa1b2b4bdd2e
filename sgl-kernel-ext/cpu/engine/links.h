// A device's ends of links: of its lanes to FFN ranks, on this device or others, and of the lanes
// of other devices to its FFN rank.
#ifndef CROSSPOOL_CPU_ENGINE_LINKS_H
#define CROSSPOOL_CPU_ENGINE_LINKS_H

#include <crosspool/lanes.h>
#include <crosspool/signal.h>

#include <cstdint>

#include "../links/connection.h"

namespace crosspool {

// The counters of crosspool.transport.data_path.LinkCounters. The loop writes, any thread reads.
struct LinkCounters {
  std::uint64_t dispatches;
  std::uint64_t rows;
  std::uint64_t dispatch_bytes;
  std::uint64_t combine_bytes;

  void count_dispatch(std::uint64_t of_rows, std::uint64_t bytes) {
    add(dispatches, 1);
    add(rows, of_rows);
    add(dispatch_bytes, bytes);
  }
  void count_combine(std::uint64_t bytes) { add(combine_bytes, bytes); }

 private:
  static void add(std::uint64_t& counter, std::uint64_t value) {
    Atomic<std::uint64_t> atomic(counter);
    atomic.store(atomic.load(kRelaxed) + value, kRelaxed);
  }
};

// Either end of a link to another device, as the host describes it.
struct LinkDescription {
  Link* link;
  std::uint64_t payload_bytes;
  std::uint32_t max_rows;
  std::uint32_t max_row_bytes;
  crosspool_doorbell* peer;  // the doorbell of the other end's device; null with a connection
  LinkCounters* counters;
  Connection* connection;  // to the memory of the other end, on another host; null on this one
  std::int32_t attention_rank;
  std::int32_t lane;
  std::int32_t ffn_rank;

  LinkMemory memory() const { return {link, payload_bytes, max_rows, max_row_bytes}; }
};

// How what one end does gets to the other.
struct PeerDevice {
  crosspool_doorbell* doorbell = nullptr;
  Connection* connection = nullptr;

  // Before a look at what the peer has published.
  void look() const {
    if (connection != nullptr) connection->progress();
  }
  // After something was published.
  void tell() const {
    if (connection != nullptr) {
      connection->publish();
    } else {
      crosspool_doorbell_ring(doorbell);
    }
  }
};

// A lane's link to one FFN rank.
struct OutgoingLink {
  bool local = true;
  AttentionEnd end;  // of a link to another device, as is `peer`
  PeerDevice peer;
  LinkCounters* counters = nullptr;

  bool free() {
    if (local) return true;
    peer.look();
    return end.free();
  }
  bool replied() {
    if (local) return true;
    peer.look();
    return end.replied();
  }
  void dispatch(const DispatchHeader& header) {
    if (peer.connection != nullptr) end.take_up();
    end.dispatch(header);
    peer.tell();
  }
};

// A lane of an attention rank on another device.
struct IncomingLink {
  FFNEnd end;
  PeerDevice peer;
  LinkCounters* counters;
  std::int32_t attention_rank;
  std::int32_t lane;

  Poll poll() {
    peer.look();
    return end.poll();
  }
  void reply() {
    end.reply();
    peer.tell();
  }
  void refuse() {
    end.refuse();
    peer.tell();
  }
};

}  // namespace crosspool

#endif
