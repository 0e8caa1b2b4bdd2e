"""Settles at which addresses devices are linked over a network, and listens at those of a host."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator, Mapping

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.hosts import HostAddress, NetworkLinks
from crosspool.models.spec import ModelSpec
from crosspool.transport.data_path import between_hosts
from crosspool.transport.handshake import ID_BYTES
from crosspool.transport.host_messages import HostFacts
from crosspool.transport.links import room_for_rows

_FIRST_PORT = 2
"""The first port of links, counted from that of ``dist_init_addr``."""
_LAST_PORT = 65535


def own_address(node0: HostAddress) -> str:
    """Returns the address of this host from which it reaches node 0, or that of node 0 on it.
    Raises ConfigError where there is no way to it."""
    host, port = node0.numeric
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"dist_init_addr: {host} cannot be reached: {error.strerror}") from None


def settle_links(
    deployment: Deployment, specs: Mapping[int, ModelSpec], hosts: Mapping[int, HostFacts]
) -> NetworkLinks | None:
    """Gives every device with an FFN rank that other hosts need an address of its own; None where
    no link leaves its host. Raises ConfigError where ports do not suffice."""
    pairs = between_hosts(deployment)
    if not pairs:
        return None
    addresses = {}
    for rank in sorted({ffn_rank for _, ffn_rank in pairs}):
        device = deployment.weight_pool_devices[rank]
        port = deployment.host_address.port + _FIRST_PORT + rank
        if port > _LAST_PORT:
            raise ConfigError(
                f"dist_init_addr: {device.name} would listen at port {port}: give a port of at "
                f"most {_LAST_PORT - _FIRST_PORT - len(deployment.weight_pool_devices) + 1}"
            )
        addresses[device.name] = hosts[device.node].address, port
    return NetworkLinks(
        start=secrets.token_hex(ID_BYTES),
        max_row_bytes=room_for_rows(specs),
        addresses=addresses,
    )


@contextlib.contextmanager
def listening(deployment: Deployment) -> Iterator[Mapping[str, int]]:
    """Listens for the links of this host's devices; yields the sockets' descriptors by the names of
    the devices. Raises ConfigError."""
    addresses = {} if deployment.network_links is None else deployment.network_links.addresses
    with contextlib.ExitStack() as stack:
        descriptors = {}
        for device in deployment.own_devices:
            if device.name not in addresses:
                continue
            host, port = addresses[device.name]
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                listener = socket.create_server((host, port), family=family)
            except OSError as error:
                raise ConfigError(
                    f"dist_init_addr: {device.name} cannot listen on {host}:{port}, a port after "
                    f"it: {error.strerror}"
                ) from None
            descriptors[device.name] = stack.enter_context(listener).fileno()
        yield descriptors
