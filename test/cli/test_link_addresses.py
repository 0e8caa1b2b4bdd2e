"""Where devices are linked over a network, and who listens there."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest
from crosspool.cli.network_links import listening, own_address, settle_links
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.hosts import HostAddress
from crosspool.transport.host_messages import HostFacts
from crosspool.transport.links import ROW_ROOM, find_peers
from support.server import free_port


def deployment_of(*weights: str, port: int = 20000, node: int = 0) -> Deployment:
    return Deployment(
        models={0: ModelConfig(name="m", path="/m")},
        next_model=1,
        kv_pool_devices=(Device("cpu:0"),),
        weight_pool_devices=tuple(map(Device, weights)),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        nnodes=3,
        node_rank=node,
        dist_init_addr=f"127.0.0.1:{port}",
    )


HOSTS = {
    node: HostFacts(cores=(0,), available_bytes=1, address=f"127.0.0.{node + 1}")
    for node in range(3)
}


def test_ffn_ranks_that_other_hosts_need_have_a_port_each() -> None:
    found = settle_links(deployment_of("cpu:1", "node1/cpu:0", "node2/cpu:0"), {}, HOSTS)
    assert found is not None
    assert found.addresses == {
        "node1/cpu:0": ("127.0.0.2", 20003),
        "node2/cpu:0": ("127.0.0.3", 20004),
    }
    assert found.max_row_bytes == ROW_ROOM
    again = settle_links(deployment_of("node1/cpu:0"), {}, HOSTS)
    assert again is not None and again.start != found.start
    assert settle_links(deployment_of("cpu:0", "cpu:1"), {}, HOSTS) is None
    with pytest.raises(ConfigError, match=r"port 65536: give a port of at most 65533"):
        settle_links(deployment_of("node1/cpu:0", port=65534), {}, HOSTS)


def test_a_host_listens_for_its_own_devices() -> None:
    port = free_port()
    both = deployment_of("node1/cpu:0", "node2/cpu:0", port=port - 2)
    both = msgspec.structs.replace(both, network_links=settle_links(both, {}, HOSTS))
    with listening(both) as none:
        assert none == {}
    first = msgspec.structs.replace(both, node_rank=1)
    with listening(first) as found:
        assert list(found) == ["node1/cpu:0"]
        with socket.create_connection(("127.0.0.2", port)):
            pass
        taken = pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.2:{port}, a port after")
        with taken, listening(first):
            pass


def test_a_device_finds_its_peers_by_what_was_settled(tmp_path: Path) -> None:
    both = deployment_of("cpu:0", "node1/cpu:0")
    assert find_peers(both, Device("cpu:0"), None, 3) is None
    settled = settle_links(both, {}, HOSTS)
    assert settled is not None
    both = msgspec.structs.replace(both, network_links=settled, runtime_dir=str(tmp_path))
    both.data_key.write_bytes(bytes(range(32)))
    peers = find_peers(both, Device("cpu:0"), None, 3)
    assert peers is not None
    assert peers.addresses == settled.addresses
    assert peers.credentials.deployment.hex() == settled.start
    assert (peers.credentials.incarnation, peers.listener) == (3, None)
    assert find_peers(both, Device("cpu:9"), None, 1) is None


def test_a_host_knows_its_address_towards_node_0() -> None:
    assert own_address(HostAddress("127.0.0.1", 20000)) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"dist_init_addr: nowhere\.invalid has no address"):
        own_address(HostAddress("nowhere.invalid", 1))
