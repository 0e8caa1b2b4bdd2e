"""The hosts of a deployment: which there are, where node 0 listens, and what each must be told."""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.config.options import ServerOptions

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([\w.-]+)):(\d{1,5})")


class HostAddress(NamedTuple):
    """Where node 0 listens for other hosts: launchers at ``port``, device processes at the port
    after it."""

    host: str
    port: int

    @property
    def launchers(self) -> str:
        """What the launchers of other hosts connect to, as ZMQ writes it."""
        return self._tcp(self.port)

    @property
    def devices(self) -> str:
        """What the device processes of other hosts connect to, as ZMQ writes it."""
        return self._tcp(self.port + 1)

    @property
    def numeric(self) -> HostAddress:
        """The same address as a number, which a socket can be bound to. Raises ConfigError where
        the name is none."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"dist_init_addr: {self.host} has no address: {error}") from None
        return HostAddress(str(found[0][4][0]), self.port)

    def _tcp(self, port: int) -> str:
        return f"tcp://[{self.host}]:{port}" if ":" in self.host else f"tcp://{self.host}:{port}"


class NetworkLinks(msgspec.Struct, frozen=True, kw_only=True):
    """What the devices of several hosts have to agree on so that hidden states cross between
    them."""

    start: str
    """Names this start of the deployment: 32 hexadecimal digits."""
    max_row_bytes: int
    """Bytes of the widest row that a link has room for."""
    addresses: dict[str, tuple[str, int]]
    """Where each device listens that has an FFN rank with links to other hosts."""


def host_address(given: str) -> HostAddress:
    """Parses HOST:PORT or [IPV6]:PORT. Raises ConfigError."""
    match = _ADDRESS.fullmatch(given)
    if match is None or not 1 <= int(match.group(3)) <= 65534:
        raise ConfigError(
            f"dist_init_addr: {given!r} is no address like HOST:PORT, with a port from 1 to 65534"
        )
    return HostAddress(match.group(1) or match.group(2), int(match.group(3)))


def check_hosts(options: ServerOptions) -> None:
    """Raises ConfigError where the hosts, as the options have them, cannot find each other."""
    last = options.nnodes - 1
    if options.node_rank > last:
        raise ConfigError(
            f"node_rank: {options.node_rank} must be less than nnodes, {options.nnodes}: hosts are "
            "numbered from 0"
        )
    if options.nnodes > 1:
        if options.dist_init_addr is None:
            raise ConfigError(
                f"dist_init_addr is missing: nnodes is {options.nnodes}, so give the address of "
                "node 0 as --dist-init-addr HOST:PORT on every host"
            )
        host_address(options.dist_init_addr)
        if options.keys is None:
            raise ConfigError(
                f"keys is missing: nnodes is {options.nnodes}, and hosts talk to each other only "
                "with keys: make a file with `crosspool keys new`, and give it to every host as "
                "--keys FILE"
            )


def check_devices_of_hosts(options: ServerOptions) -> None:
    """Raises ConfigError where a device is on none of the hosts, or a host has no device. Node 0
    needs none: it has the front end and the scheduler."""
    last = options.nnodes - 1
    for field in ("kv_pool_devices", "weight_pool_devices"):
        for device in getattr(options, field):
            if device.node > last:
                there = f"the hosts are node 0 to node {last}" if last else "there is one host"
                raise ConfigError(
                    f"{field}: {device.name} is on node {device.node}, and {there}: give --nnodes "
                    f"{device.node + 1}, or another device"
                )
    used = {d.node for d in (*options.kv_pool_devices, *options.weight_pool_devices)}
    idle = [f"node {node}" for node in range(1, options.nnodes) if node not in used]
    if idle:
        raise ConfigError(
            f"nnodes: {', '.join(idle)} of {options.nnodes} hosts has no device in "
            "kv_pool_devices or weight_pool_devices: name one as node1/cpu, or start fewer hosts"
        )
