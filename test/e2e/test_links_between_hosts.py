"""One deployment over two hosts, which are network namespaces, with its pools apart: attention on
node 0, FFN weights on node 1, so that hidden states cross between them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.server import TINY_MODELS, Server
from support.two_hosts import PROMPTS, TwoHosts, process_of, said_by_one_host, two_hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    cores = sorted(os.sched_getaffinity(0))
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder, kv=f"cpu:{cores[0]}", weights=f"node1/cpu:{cores[-1]}") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, list[list[int]]]:
    return said_by_one_host(server)


def test_tokens_are_those_of_one_host(
    hosts: TwoHosts, expected: dict[str, list[list[int]]]
) -> None:
    for model in TINY_MODELS:
        assert [hosts.generate(model, prompt) for prompt in PROMPTS] == expected[model], hosts.log
    assert [device["node"] for device in hosts.devices()] == [0, 1]


def test_a_host_listens_for_links_where_it_was_told(hosts: TwoHosts) -> None:
    listening = hosts.bed.run(1, "ss", "-Hltn").split()
    assert f"{hosts.bed.address(1)}:{int(hosts.control) + 2}" in listening


@pytest.mark.parametrize("node", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_device_that_is_killed_is_replaced(
    node: int, hosts: TwoHosts, expected: dict[str, list[list[int]]]
) -> None:
    device = hosts.devices()[node]
    victim = process_of(f"crosspool::device {device['name']}", hosts.launchers[node].pid)
    hosts.lose(victim.kill, expected[TINY_MODELS[0]])
    hosts.wait(lambda: hosts.devices()[node]["restarts"] > device["restarts"])


@pytest.mark.slow
def test_a_short_cut_is_not_noticed(hosts: TwoHosts, expected: dict[str, list[list[int]]]) -> None:
    """The control path outlives it; of the data path, connections may be made again."""
    incarnations = [device["incarnation"] for device in hosts.devices()]
    hosts.lose(lambda: hosts.cut_for(1), expected[TINY_MODELS[0]])
    assert [device["incarnation"] for device in hosts.devices()] == incarnations, hosts.log


@pytest.mark.slow
def test_a_host_that_is_cut_off_comes_back(
    hosts: TwoHosts, expected: dict[str, list[list[int]]]
) -> None:
    hosts.lose(lambda: hosts.cut_for(8), expected[TINY_MODELS[0]])
