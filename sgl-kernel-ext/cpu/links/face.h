// The C face of connections to other hosts, for crosspool/kernels/network.py.
#ifndef CROSSPOOL_CPU_LINKS_FACE_H
#define CROSSPOOL_CPU_LINKS_FACE_H

#include <crosspool/export.h>

#include <cstdint>

#include "network.h"

extern "C" {

// Sets `*network`; returns 0 or -errno.
CROSSPOOL_API std::int32_t crosspool_network_create(crosspool_doorbell* doorbell,
                                                    crosspool::Network** network);
CROSSPOOL_API void crosspool_network_free(crosspool::Network* network);
// Returns a connection that lives as long as the network. `end` is a LinkEnd.
CROSSPOOL_API crosspool::Connection* crosspool_network_add(crosspool::Network* network, void* link,
                                                           std::uint64_t payload_bytes,
                                                           std::uint32_t max_rows,
                                                           std::uint32_t max_row_bytes,
                                                           std::int32_t end);
CROSSPOOL_API void crosspool_network_hand_over(crosspool::Network* network,
                                               crosspool::Connection* connection,
                                               std::int32_t socket);
CROSSPOOL_API std::int32_t crosspool_network_losses(crosspool::Network* network);
// See Network::wait. Returns whether there may be news.
CROSSPOOL_API std::int32_t crosspool_network_wait(crosspool::Network* network, std::uint32_t* seen,
                                                  std::int64_t spin_ns, std::int64_t timeout_ns);
CROSSPOOL_API void crosspool_connection_publish(crosspool::Connection* connection);
CROSSPOOL_API std::int32_t crosspool_connection_progress(crosspool::Connection* connection);
CROSSPOOL_API void crosspool_connection_status(crosspool::Connection* connection,
                                               crosspool::ConnectionStatus* status);
}

#endif
