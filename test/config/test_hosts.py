"""What the options say of hosts, and which of it cannot be."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from crosspool.cli.serve import read_options
from crosspool.config.deployment import Deployment
from crosspool.config.deployment_file import read
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.config.flags import parse
from crosspool.config.hosts import (
    HostAddress,
    check_devices_of_hosts,
    check_hosts,
    host_address,
)
from crosspool.config.options import ServerOptions
from crosspool.transport.links import check_reach

TWO = {"nnodes": 2, "dist_init_addr": "10.0.0.1:20000", "keys": "keys"}


def options(**given: object) -> ServerOptions:
    return msgspec.convert(
        {**given, **{k: [{"name": n} for n in v] for k, v in given.items() if "devices" in k}},
        ServerOptions,
    )


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("10.0.0.1:20000", HostAddress("10.0.0.1", 20000)),
        ("host-0.example.org:1", HostAddress("host-0.example.org", 1)),
        ("[fd00::1]:20000", HostAddress("fd00::1", 20000)),
    ],
)
def test_addresses(given: str, address: HostAddress) -> None:
    assert host_address(given) == address


def test_devices_speak_to_the_next_port() -> None:
    assert host_address("[::1]:5000").launchers == "tcp://[::1]:5000"
    assert host_address("10.0.0.1:5000").devices == "tcp://10.0.0.1:5001"


def test_names_become_numbers_before_a_socket_is_bound() -> None:
    assert host_address("localhost:5000").numeric.host in ("127.0.0.1", "::1")
    with pytest.raises(ConfigError, match=r"dist_init_addr: no\.such\.host\.invalid has no addr"):
        _ = host_address("no.such.host.invalid:5000").numeric


@pytest.mark.parametrize(
    "given",
    ["", "host", "host:", "host:0", "host:65535", "host:x", "::1:5000", "tcp://h:1", "a:1 "],
)
def test_what_is_no_address_is_told(given: str) -> None:
    with pytest.raises(ConfigError, match=r"dist_init_addr: .* is no address like HOST:PORT"):
        host_address(given)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"node_rank": 1}, "node_rank: 1 must be less than nnodes, 1: hosts are numbered from 0"),
        ({**TWO, "node_rank": 2}, "node_rank: 2 must be less than nnodes, 2"),
        ({**TWO, "dist_init_addr": None}, "dist_init_addr is missing: nnodes is 2"),
        ({**TWO, "dist_init_addr": "host"}, "dist_init_addr: 'host' is no address"),
        ({**TWO, "keys": None}, "keys is missing: nnodes is 2.*crosspool keys new"),
    ],
)
def test_hosts_that_cannot_find_each_other(given: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_hosts(options(**given))


def test_hosts_that_can_find_each_other() -> None:
    check_hosts(options())
    check_hosts(options(dist_init_addr="anything"))  # as SGLang's command lines for one host have
    check_hosts(options(**TWO, node_rank=1))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"kv_pool_devices": ["node1/cpu"]},
            "kv_pool_devices: node1/cpu is on node 1, and there is one host: give --nnodes 2",
        ),
        (
            {**TWO, "weight_pool_devices": ["node1/cpu", "node2/cuda:0"]},
            "weight_pool_devices: node2/cuda:0 is on node 2, and the hosts are node 0 to node 1: "
            "give --nnodes 3",
        ),
        (TWO, "nnodes: node 1 of 2 hosts has no device"),
        ({**TWO, "nnodes": 4, "kv_pool_devices": ["node2/cpu"]}, "node 1, node 3 of 4 hosts"),
    ],
)
def test_devices_that_are_on_no_host(given: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_devices_of_hosts(options(**given))


def test_node_0_needs_no_device() -> None:
    pools = {"kv_pool_devices": ["node1/cpu"], "weight_pool_devices": ["node1/cpu"]}
    check_devices_of_hosts(options(**TWO, **pools))


def deployment(kv: tuple[str, ...], weights: tuple[str, ...], node: int = 0) -> Deployment:
    return Deployment(
        models={},
        next_model=0,
        kv_pool_devices=tuple(map(Device, kv)),
        weight_pool_devices=tuple(map(Device, weights)),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        node_rank=node,
    )


def test_each_host_has_devices_of_its_own() -> None:
    pools = ("cpu:0", "node1/cpu:0"), ("node1/cpu:0", "node2/cpu:0")
    own = [[d.name for d in deployment(*pools, node).own_devices] for node in range(3)]
    assert own == [["cpu:0"], ["node1/cpu:0"], ["node2/cpu:0"]]
    assert deployment(*pools).other_nodes == (1, 2)
    assert deployment(("cpu",), ("cpu",)).other_nodes == ()


def test_hidden_states_cross_between_cpus_of_hosts() -> None:
    check_reach(deployment(("cpu:0",), ("node1/cpu:0", "node1/cpu:1")))
    check_reach(deployment(("node1/cuda:0",), ("node1/cuda:1",)))
    for pools in (("cpu:0",), ("node1/cuda:0",)), (("node1/cuda:0",), ("cpu:0",)):
        with pytest.raises(ConfigError, match="only CPUs are linked over a network"):
            check_reach(deployment(*pools))


def test_the_flags_are_sglangs() -> None:
    words = ["--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "h:1", "--keys", "/k"]
    given = parse([*words, "--dist-timeout", "30"])
    assert (given.nnodes, given.node_rank, given.dist_init_addr) == (2, 1, "h:1")
    assert (given.keys, given.dist_timeout, given.models) == ("/k", 30.0, ())
    with pytest.raises(ConfigError, match="--model-path is missing"):
        parse([*words, "--node-rank", "0"])
    with pytest.raises(ConfigError, match="--nnodes: 0 must be between 1 and 1024"):
        parse([*words, "--nnodes", "0"])


def test_one_file_serves_all_hosts(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "models: [{path: m}]\nnnodes: 2\nkeys: the.keys\ndist_init_addr: h:1\n"
        "kv_pool_devices: node1/cpu:0-3\nweight_pool_devices: [node1/cpu:0-3, node1/cpu:4]\n"
    )
    assert read(file).keys == str(tmp_path / "the.keys")
    given = read_options(["--config", str(file), "--node-rank", "1"], "crosspool serve")
    assert given.node_rank == 1
    assert [d.name for d in given.weight_pool_devices] == ["node1/cpu:0-3", "node1/cpu:4"]
