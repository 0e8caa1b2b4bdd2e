"""One deployment over two hosts, which are network namespaces: the front end and the scheduler on
node 0, both pools on node 1."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest
from support.namespaces import Network
from support.server import DEMO, TINY_MODELS, Server
from support.several_hosts import (
    PROMPTS,
    SECONDS,
    SeveralHosts,
    process_of,
    said_by_one_host,
    several_hosts,
)

LATER = "later"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeveralHosts]:
    with several_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, list[list[int]]]:
    return said_by_one_host(server)


def listening(bed: Network, node: int) -> list[str]:
    """Addresses at which a host listens, as ``ss`` tells."""
    lines = bed.run(node, "ss", "-Hltn").splitlines()
    return sorted(line.split()[3] for line in lines)


def test_tokens_are_those_of_one_host(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    for model in TINY_MODELS:
        assert [hosts.generate(model, prompt) for prompt in PROMPTS] == expected[model]
    assert [device["node"] for device in hosts.devices()] == [1, 1]


def test_what_listens_is_what_the_document_says(hosts: SeveralHosts) -> None:
    control = int(hosts.control)
    address = hosts.bed.address(0)
    assert listening(hosts.bed, 0) == sorted(
        [f"{address}:{control}", f"{address}:{control + 1}", f"127.0.0.1:{hosts.port}"]
    )
    assert listening(hosts.bed, 1) == []


def lose_and_compare(
    hosts: SeveralHosts, expected: list[list[int]], lose: Callable[[], None]
) -> None:
    """Loses something while requests run; afterwards all devices work, one of them anew."""
    before = max(device["restarts"] for device in hosts.devices())
    hosts.lose(lose, expected)
    hosts.wait_back(before + 1)


def test_a_device_that_is_killed_is_replaced(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    device = hosts.devices()[0]["name"]
    victim = process_of(f"crosspool::device {device}", hosts.launchers[1].pid)
    lose_and_compare(hosts, expected[TINY_MODELS[0]], victim.kill)


def test_a_scheduler_that_is_killed_is_replaced(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    process_of("crosspool::scheduler", hosts.launchers[0].pid).kill()
    time.sleep(0.5)
    for prompt, tokens in zip(PROMPTS, expected[TINY_MODELS[0]], strict=True):
        assert hosts.generate(TINY_MODELS[0], prompt) == tokens, hosts.log
    assert all(device["ready"] for device in hosts.devices())


def test_a_model_may_come_later(hosts: SeveralHosts, expected: dict[str, list[list[int]]]) -> None:
    body = {"path": str(DEMO / TINY_MODELS[1]), "name": LATER, "dtype": "float32"}
    with hosts.client() as client:
        answer = client.post("/crosspool/models", json=body)
    assert answer.status_code in (200, 201), answer.text
    assert hosts.generate(LATER, PROMPTS[0]) == expected[TINY_MODELS[1]][0]


@pytest.mark.slow
def test_a_short_cut_is_not_noticed(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    """It is shorter than ``--host-timeout``, and TCP sends again what was lost."""
    incarnations = [device["incarnation"] for device in hosts.devices()]
    hosts.cut_for(1)
    for prompt, tokens in zip(PROMPTS, expected[TINY_MODELS[0]], strict=True):
        assert hosts.generate(TINY_MODELS[0], prompt) == tokens, hosts.log
    assert [device["incarnation"] for device in hosts.devices()] == incarnations, hosts.log


@pytest.mark.slow
def test_a_launcher_that_is_killed_may_come_back(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    def lose() -> None:
        victim = hosts.launchers[1]
        victim.kill()
        victim.wait()
        hosts.start(1)

    lose_and_compare(hosts, expected[TINY_MODELS[0]], lose)
    names = [model["name"] for model in hosts.get("/crosspool/models")]
    assert LATER in names
    tokens = [hosts.generate(LATER, prompt) for prompt in PROMPTS]
    assert tokens == expected[TINY_MODELS[1]], hosts.log


@pytest.mark.slow
def test_a_host_that_is_cut_off_comes_back(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    lose_and_compare(hosts, expected[TINY_MODELS[0]], lambda: hosts.cut_for(8))


def test_hosts_end_together(hosts: SeveralHosts) -> None:
    """It is the last test of the module's hosts."""
    hosts.launchers[0].send_signal(signal.SIGTERM)
    assert hosts.launchers[0].wait(SECONDS) == 0, hosts.log
    assert hosts.launchers[1].wait(SECONDS) == 0, hosts.log
