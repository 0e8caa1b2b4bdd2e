"""One deployment over two hosts, which are network namespaces, with its pools apart: attention on
node 0, FFN weights on node 1, so that hidden states cross between them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from support.namespaces import needs_losses
from support.server import ROOT, TINY_MODELS, Server
from support.several_hosts import PROMPTS, SeveralHosts, process_of, said_by_one_host, several_hosts

STRANGERS = int(os.environ.get("CROSSPOOL_STRANGERS", "2000"))
SPARE_DESCRIPTORS = 4
"""Descriptors that a process may have more than before: of clients that come and go."""
GROWN_BYTES = 48 << 20
LINES_AT_ONCE, LINES_A_SECOND = 120, 8
"""Each of the places that log what strangers do writes at most ten lines in ten seconds."""
SAID = (
    "its handshake failed",
    "its key is not of this deployment",
    "their keys differ",
    "what came is no greeting of CrossPool",
    "dropped what is no message of another host",
)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeveralHosts]:
    cores = sorted(os.sched_getaffinity(0))
    folder = tmp_path_factory.mktemp("hosts")
    with several_hosts(folder, kv=f"cpu:{cores[0]}", weights=f"node1/cpu:{cores[-1]}") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, list[list[int]]]:
    return said_by_one_host(server)


def test_tokens_are_those_of_one_host(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    for model in TINY_MODELS:
        assert [hosts.generate(model, prompt) for prompt in PROMPTS] == expected[model], hosts.log
    assert [device["node"] for device in hosts.devices()] == [0, 1]


def held(hosts: SeveralHosts) -> dict[int, tuple[int, int]]:
    """Descriptors and resident bytes of every process of both hosts."""
    found = {}
    for launcher in hosts.launchers.values():
        family = [psutil.Process(launcher.pid)]
        family += family[0].children(recursive=True)
        found |= {one.pid: (one.num_fds(), one.memory_info().rss) for one in family}
    return found


def let_strangers_come(hosts: SeveralHosts, count: int, seed: int) -> None:
    """Has strangers make so many connections to all ports, each from where it is reached."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "test")}
    strangers = []
    for kind, node in (("launchers", 1), ("scheduler", 1), ("links", 0), ("front end", 0)):
        words = [sys.executable, "-m", "support.strangers", kind, str(count // 4), str(seed)]
        words += [str(hosts.port), str(hosts.keys)]
        strangers.append(hosts.bed.start(node, words, env=environment))
    assert [one.wait(600) for one in strangers] == [0] * len(strangers)


def test_strangers_change_nothing(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Connections without a key, with another deployment's, with what was recorded of one that
    had it, and with bytes that are no message, at every port of both hosts, while requests run."""
    let_strangers_come(hosts, STRANGERS // 10, 1)
    incarnations = [device["incarnation"] for device in hosts.devices()]
    hosts.wait(lambda: bool(hosts.devices()))
    before, log, began = held(hosts), len(hosts.log), time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(let_strangers_come, hosts, STRANGERS, 2)
        asked = 0
        while not (coming.done() and asked):
            which = asked % len(PROMPTS)
            tokens = hosts.generate(TINY_MODELS[0], PROMPTS[which])
            assert tokens == expected[TINY_MODELS[0]][which], hosts.log
            asked += 1
        coming.result()
    seconds = time.monotonic() - began
    after = {}

    def has_closed_what_came() -> bool:
        after.update(held(hosts))
        return all(after[pid][0] <= before[pid][0] + SPARE_DESCRIPTORS for pid in before)

    hosts.wait(has_closed_what_came)
    assert after.keys() == before.keys(), "a process has ended"
    assert [device["incarnation"] for device in hosts.devices()] == incarnations, hosts.log
    grown = max(after[pid][1] - before[pid][1] for pid in before)
    lines = hosts.log[log:].splitlines()
    told = f"{STRANGERS} strangers in {seconds:.1f} s: {asked} requests, {len(lines)} lines logged"
    with capsys.disabled():
        print(f"\n{told}, {grown / 2**20:.1f} MiB grown at most")
    assert grown < GROWN_BYTES
    assert len(lines) < LINES_AT_ONCE + LINES_A_SECOND * seconds, "\n".join(lines)
    assert "Traceback" not in "".join(lines)
    for said in SAID:
        assert said in hosts.log


def test_a_host_listens_for_links_where_it_was_told(hosts: SeveralHosts) -> None:
    listening = hosts.bed.run(1, "ss", "-Hltn").split()
    assert f"{hosts.bed.address(1)}:{int(hosts.control) + 2}" in listening


@pytest.mark.parametrize("node", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_device_that_is_killed_is_replaced(
    node: int, hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    device = hosts.devices()[node]
    victim = process_of(f"crosspool::device {device['name']}", hosts.launchers[node].pid)
    hosts.lose(victim.kill, expected[TINY_MODELS[0]])
    hosts.wait(lambda: hosts.devices()[node]["restarts"] > device["restarts"])


@pytest.mark.slow
def test_a_short_cut_is_not_noticed(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    """The control path outlives it; of the data path, connections may be made again."""
    incarnations = [device["incarnation"] for device in hosts.devices()]
    hosts.lose(lambda: hosts.cut_for(1), expected[TINY_MODELS[0]])
    assert [device["incarnation"] for device in hosts.devices()] == incarnations, hosts.log


@pytest.mark.slow
def test_a_host_that_is_cut_off_comes_back(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]]
) -> None:
    hosts.lose(lambda: hosts.cut_for(8), expected[TINY_MODELS[0]])


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_line_that_was_down_loses_nothing(
    seconds: float,
    hosts: SeveralHosts,
    expected: dict[str, list[list[int]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is down for less than ``--host-timeout``, or for much more; requests wait meanwhile."""
    took = hosts.lose(lambda: hosts.down_for(seconds), expected[TINY_MODELS[0]])
    with capsys.disabled():
        print(f"\nthe line was down for {seconds} s; all requests had ended {took:.2f} s after it")
    hosts.wait(lambda: all(device["ready"] for device in hosts.devices()))
    for model in TINY_MODELS:
        assert [hosts.generate(model, prompt) for prompt in PROMPTS] == expected[model], hosts.log


@pytest.mark.slow
def test_lost_packets_change_no_token(
    hosts: SeveralHosts, expected: dict[str, list[list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One of a hundred, in both directions: TCP sends them again."""
    needs_losses()
    incarnations = [device["incarnation"] for device in hosts.devices()]
    for node in hosts.nodes:
        hosts.bed.lose(node, 1)
    began = time.monotonic()
    for model in TINY_MODELS:
        assert [hosts.generate(model, prompt) for prompt in PROMPTS] == expected[model], hosts.log
    seconds = time.monotonic() - began
    lost = [hosts.bed.stop_losing(node) for node in hosts.nodes]
    with capsys.disabled():
        print(f"\n{lost} packets lost on the way to the hosts in {seconds:.1f} s")
    assert all(lost)
    assert [device["incarnation"] for device in hosts.devices()] == incarnations, hosts.log
