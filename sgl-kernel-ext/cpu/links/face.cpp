#include "face.h"

#include <system_error>

using crosspool::Connection;
using crosspool::Network;

std::int32_t crosspool_network_create(crosspool_doorbell* doorbell, Network** network) {
  try {
    *network = new Network(doorbell);
    return 0;
  } catch (const std::system_error& error) {
    return -error.code().value();
  }
}

void crosspool_network_free(Network* network) { delete network; }

Connection* crosspool_network_add(Network* network, void* link, std::uint64_t payload_bytes,
                                  std::uint32_t max_rows, std::uint32_t max_row_bytes,
                                  std::int32_t end) {
  const crosspool::LinkMemory memory{static_cast<crosspool::Link*>(link), payload_bytes, max_rows,
                                     max_row_bytes};
  return &network->add(memory, static_cast<crosspool::LinkEnd>(end));
}

void crosspool_network_hand_over(Network* network, Connection* connection, std::int32_t socket) {
  network->hand_over(*connection, socket);
}

std::int32_t crosspool_network_losses(Network* network) { return network->losses(); }

std::int32_t crosspool_network_wait(Network* network, std::uint32_t* seen, std::int64_t spin_ns,
                                    std::int64_t timeout_ns) {
  return network->wait(seen, spin_ns, timeout_ns) ? 1 : 0;
}

void crosspool_connection_publish(Connection* connection) { connection->publish(); }

std::int32_t crosspool_connection_progress(Connection* connection) {
  return connection->progress() ? 1 : 0;
}

void crosspool_connection_status(Connection* connection, crosspool::ConnectionStatus* status) {
  *status = connection->status();
}
