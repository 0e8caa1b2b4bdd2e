"""Links between devices of two hosts, over loopback, with the threads that connect them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.kernels.native import Doorbell
from crosspool.transport import links, shared_memory
from crosspool.transport.data_path import DispatchHeader, LaneError, between_hosts, within_hosts
from crosspool.transport.network_links import NetworkTransport
from crosspool.transport.shared_memory import SharedMemoryTransport
from support.hosts import Hosts
from support.linked_devices import deployment_of

HIDDEN = 48
FAR = "node1/cpu:0"
Make = Callable[..., NetworkTransport]


@pytest.fixture
def deployment() -> Deployment:
    return deployment_of(("cpu:0",), (FAR,))


@pytest.fixture
def hosts(deployment: Deployment) -> Iterator[Hosts]:
    hosts = Hosts(deployment, HIDDEN * 4)
    yield hosts
    hosts.close()


@pytest.fixture
def make(deployment: Deployment, hosts: Hosts) -> Iterator[Make]:
    """Makes a device's ends."""
    with contextlib.ExitStack() as stack:

        def made(name: str, **changed: object) -> NetworkTransport:
            device = Device(name)
            transport = NetworkTransport(
                deployment, device, hosts.peers(device, **changed), spin_ns=0
            )
            stack.callback(transport.close)
            return transport

        yield made


def until(what: Callable[[], bool], *waiting: NetworkTransport) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        for transport in waiting:
            transport.wait(0.001)


def header(rows: int, layer: int = 0, epoch: int = 1) -> DispatchHeader:
    return DispatchHeader(epoch=epoch, model=0, layer=layer, rows=rows)


def test_every_lane_carries_rows_both_ways(make: Make) -> None:
    attention, ffn = make("cpu:0"), make(FAR)
    ends = [(attention.attention_link(lane, 0), ffn.ffn_link(0, lane)) for lane in range(2)]
    for lane, (here, there) in enumerate(ends):
        until(lambda here=here: here.free, ffn)
        for layer in range(3):
            hidden = torch.randn(5 + lane, HIDDEN)
            here.dispatch(header(5 + lane, layer), hidden)
            until(lambda there=there: there.poll() is not None, ffn)
            assert there.poll() == header(5 + lane, layer)
            assert torch.equal(there.hidden(torch.float32), hidden)
            there.reply(hidden + lane)
            until(here.ready, attention)
            assert torch.equal(here.combine(hidden.shape, torch.float32), hidden + lane)
        assert here.counters == there.counters
    with pytest.raises(LaneError, match="between 1 and 16 rows of at most 192 bytes fit"):
        ends[0][0].dispatch(header(17), torch.zeros(17, HIDDEN))


def test_a_new_ffn_rank_gets_the_dispatch_that_has_no_reply(make: Make) -> None:
    attention, ffn = make("cpu:0"), make(FAR)
    here, there = attention.attention_link(1, 0), ffn.ffn_link(0, 1)
    until(lambda: here.free, ffn)
    for layer in range(3):
        hidden = torch.randn(4, HIDDEN)
        here.dispatch(header(4, layer), hidden)
        until(lambda there=there: there.poll() is not None, ffn)
        ffn.close()
        ffn = make(FAR)
        there = ffn.ffn_link(0, 1)
        until(lambda there=there: there.poll() is not None, ffn, attention)
        assert there.poll() == header(4, layer)
        there.reply(-there.hidden(torch.float32))
        until(here.ready, attention, ffn)
        assert torch.equal(here.combine((4, HIDDEN), torch.float32), -hidden)


def test_a_new_attention_rank_waits_for_what_its_predecessor_left(make: Make) -> None:
    attention, ffn = make("cpu:0"), make(FAR)
    here, there = attention.attention_link(0, 0), ffn.ffn_link(0, 0)
    until(lambda: here.free, ffn)
    here.dispatch(header(3, epoch=5), torch.zeros(3, HIDDEN))
    until(lambda: there.poll() is not None, ffn)
    attention.close()
    attention = make("cpu:0")
    here = attention.attention_link(0, 0)
    other = attention.attention_link(1, 0)
    until(lambda: other.free, attention, ffn)
    for _ in range(20):
        assert not here.free
        attention.wait(0.002)
        ffn.wait(0.002)
        there.poll()
    there.reply(torch.zeros(3, HIDDEN))
    until(lambda: here.free, attention, ffn)
    here.dispatch(header(2, epoch=6), torch.ones(2, HIDDEN))
    until(lambda: (polled := there.poll()) is not None and polled.epoch == 6, ffn)
    there.reply(torch.full((2, HIDDEN), 4.0))
    until(here.ready, attention)
    assert (here.combine((2, HIDDEN), torch.float32) == 4).all()


def test_a_process_whose_place_was_taken_is_refused(
    make: Make, hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    ffn, attention = make(FAR), make("cpu:0", incarnation=9)
    here = attention.attention_link(0, 0)
    until(lambda: here.free, attention, ffn)
    make("cpu:0", incarnation=8)
    until(lambda: "a later process of the same rank" in caplog.text, ffn, attention)
    there = ffn.ffn_link(0, 0)
    here.dispatch(header(1), torch.zeros(1, HIDDEN))
    until(lambda: there.poll() is not None, ffn)


def test_a_wrong_key_is_told_once_on_both_sides(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ffn, attention = make(FAR), make("cpu:0", key=bytes(32))
    until(
        lambda: sum("their keys differ" in r.message for r in caplog.records) == 2, ffn, attention
    )
    time.sleep(0.3)
    said = [r.message for r in caplog.records if "their keys differ" in r.message]
    assert len(said) == len(set(said)) == 2
    assert not attention.attention_link(0, 0).free


def test_strangers_at_the_port_change_nothing(
    make: Make, hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    """Random bytes, half a greeting, and connections that say nothing, more than are let in."""
    ffn, attention = make(FAR), make("cpu:0")
    here, there = attention.attention_link(0, 0), ffn.ffn_link(0, 0)
    until(lambda: here.free, ffn)
    generator = random.Random(1)
    descriptors = len(os.listdir("/proc/self/fd"))
    silent = [socket.create_connection(hosts.addresses[FAR]) for _ in range(20)]
    for _ in range(150):
        with (
            socket.create_connection(hosts.addresses[FAR]) as stranger,
            contextlib.suppress(OSError),
        ):
            stranger.sendall(generator.randbytes(generator.randint(1, 400)))
    here.dispatch(header(2), torch.ones(2, HIDDEN))
    until(lambda: there.poll() is not None, ffn)
    there.reply(torch.zeros(2, HIDDEN))
    until(here.ready, attention)
    for one in silent:
        one.close()
    until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, ffn)
    logged = [r.message for r in caplog.records if "no greeting of CrossPool" in r.message]
    assert len(logged) == 1


def test_a_device_waits_for_both_kinds_of_peers() -> None:
    """An attention rank with an FFN rank on its host and one on another."""
    deployment = deployment_of(("cpu:0",), ("cpu:1", FAR))
    assert within_hosts(deployment) == [(0, 0)]
    assert between_hosts(deployment) == [(0, 1)]
    hosts = Hosts(deployment, links.ROW_ROOM)
    fd = links.create(deployment, {})
    assert fd is not None
    near = SharedMemoryTransport(fd, deployment, Device("cpu:1"))
    with contextlib.ExitStack() as resources:
        resources.callback(hosts.close)
        first, far = (
            links.join(deployment, device, lanes, hosts.peers(device), resources=resources)
            for device, lanes in ((Device("cpu:0"), fd), (Device(FAR), None))
        )
        assert isinstance(first, NetworkTransport) and isinstance(far, NetworkTransport)
        assert first.max_row_bytes == links.ROW_ROOM
        here = [first.attention_link(0, rank) for rank in (0, 1)]
        there = [near.ffn_link(0, 0), far.ffn_link(0, 0)]
        until(lambda: all(link.free for link in here), first, far)
        for end in here:
            end.dispatch(header(2), torch.ones(2, HIDDEN))
        until(lambda: all(link.poll() is not None for link in there), far)
        until(lambda: not first.wait(0.001))
        there[0].reply(torch.ones(2, HIDDEN))
        assert first.wait(60)
        until(here[0].ready, first)
        there[1].reply(torch.ones(2, HIDDEN))
        until(here[1].ready, first)
        Doorbell(first.doorbell_address).ring()
        assert first.wait(60)


def test_what_the_factory_refuses(deployment: Deployment, hosts: Hosts) -> None:
    assert links.create(deployment, {}) is None
    with pytest.raises(ValueError, match="no two ranks on different devices of one host"):
        shared_memory.create(deployment, 4)
    with pytest.raises(ConfigError, match=r"cpu:0 and node1/cuda:0 .* only CPUs are linked"):
        links.create(deployment_of(("cpu:0",), ("node1/cuda:0",)), {})
    attention = hosts.peers(Device("cpu:0"))
    with pytest.raises(ValueError, match="has no listener"):
        NetworkTransport(deployment, Device(FAR), attention)
    del hosts.addresses[FAR]
    with pytest.raises(ValueError, match=r"node1/cpu:0: no address"):
        NetworkTransport(deployment, Device("cpu:0"), attention)
    with pytest.raises(ValueError, match="steps have 16 rows"):
        NetworkTransport(deployment, Device("cpu:0"), hosts.peers(Device("cpu:0"), max_rows=3))


def test_many_rounds_with_breaks(make: Make) -> None:
    """Both sides sleep while they wait, and the connection is broken again and again."""
    attention, ffn = make("cpu:0"), make(FAR)
    here, there = attention.attention_link(0, 0), ffn.ffn_link(0, 0)
    until(lambda: here.free, ffn)
    for layer in itertools.count():
        hidden = torch.full((1 + layer % 16, HIDDEN), float(layer))
        here.dispatch(header(len(hidden), layer), hidden)
        if layer % 50 == 20:
            _break(ffn)
        until(lambda: there.poll() is not None, ffn, attention)
        there.reply(there.hidden(torch.float32) + 1)
        if layer % 50 == 40:
            _break(attention)
        until(here.ready, attention, ffn)
        assert torch.equal(here.combine(hidden.shape, torch.float32), hidden + 1)
        if layer == 200:
            return


def _break(transport: NetworkTransport) -> None:
    """Hands over sockets that are dead already, in the place of those that work."""
    for connection in transport._connections.values():
        here, there = socket.socketpair()
        there.close()
        connection.hand_over(here.detach())
