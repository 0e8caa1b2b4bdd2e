"""The lane protocol over a memfd: in one process step by step, and between two processes."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.transport import shared_memory
from crosspool.transport.data_path import DispatchHeader, LaneError
from crosspool.transport.shared_memory import SharedMemoryTransport
from support.linked_devices import deployment_of

HIDDEN = 48
PEER = Path(__file__).with_name("lane_ffn_peer.py")


@pytest.fixture
def deployment() -> Deployment:
    return deployment_of(("cpu:0",), ("cpu:1",))


@pytest.fixture
def fd(deployment):
    fd = shared_memory.create(deployment, HIDDEN * 4)
    yield fd
    os.close(fd)


@pytest.fixture
def attention(fd, deployment) -> SharedMemoryTransport:
    return SharedMemoryTransport(fd, deployment, Device("cpu:0"))


@pytest.fixture
def ffn(fd, deployment) -> SharedMemoryTransport:
    return SharedMemoryTransport(fd, deployment, Device("cpu:1"))


def header(rows: int, layer: int = 0, model: int = 0, epoch: int = 0) -> DispatchHeader:
    return DispatchHeader(epoch=epoch, model=model, layer=layer, rows=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_carries_rows_both_ways(attention, ffn, dtype):
    here, there = attention.attention_link(1, 0), ffn.ffn_link(0, 1)
    hidden = torch.randn(5, HIDDEN).to(dtype)
    assert there.poll() is None
    assert not here.ready()
    here.dispatch(header(5, layer=3, model=7, epoch=9), hidden)
    assert there.poll() == DispatchHeader(epoch=9, model=7, layer=3, rows=5)
    assert there.poll() == DispatchHeader(epoch=9, model=7, layer=3, rows=5)
    assert torch.equal(there.hidden(dtype), hidden)
    assert not here.ready()
    there.reply(hidden * 3)
    assert there.poll() is None
    assert here.ready()
    assert torch.equal(here.combine((5, HIDDEN), dtype), hidden * 3)
    assert not here.ready()
    assert here.counters == there.counters
    assert here.counters.dispatches == 1
    assert here.counters.rows == 5
    assert here.counters.dispatch_bytes == here.counters.combine_bytes == hidden.nbytes


def test_the_largest_step_fits_and_nothing_larger(attention, ffn, deployment):
    rows = deployment.max_step_tokens
    here, there = attention.attention_link(0, 0), ffn.ffn_link(0, 0)
    neighbour = ffn.ffn_link(0, 1)
    attention.attention_link(1, 0).dispatch(header(1), torch.full((1, HIDDEN), 7.0))
    assert neighbour.poll() is not None
    sent = torch.randn(rows, HIDDEN)
    here.dispatch(header(rows), sent)
    there.poll()
    received = there.hidden(torch.float32)
    there.reply(-sent)
    assert torch.equal(received, sent)
    assert torch.equal(here.combine((rows, HIDDEN), torch.float32), -sent)
    assert (neighbour.hidden(torch.float32) == 7).all()
    for size in ((rows + 1, HIDDEN), (1, HIDDEN + 1)):
        with pytest.raises(LaneError, match="rows of at most 192 bytes fit"):
            here.dispatch(header(size[0]), torch.zeros(size))
    assert not here.ready()
    assert there.poll() is None


def test_rows_and_shapes_must_agree(attention, ffn):
    here, there = attention.attention_link(0, 0), ffn.ffn_link(0, 0)
    for rows, shape in ((2, (3, HIDDEN)), (0, (0, HIDDEN)), (3, (3, 1, HIDDEN))):
        with pytest.raises(LaneError, match="rows came with"):
            here.dispatch(header(rows), torch.zeros(shape))
    here.dispatch(header(3), torch.zeros(3, HIDDEN - 1, dtype=torch.bfloat16))
    there.poll()
    with pytest.raises(LaneError, match="no whole rows of"):
        there.hidden(torch.float32)
    for wrong in (torch.zeros(2, HIDDEN - 1), torch.zeros(3, HIDDEN - 1), torch.zeros(3)):
        with pytest.raises(LaneError, match="does not fit"):
            there.reply(wrong)
    there.reply(torch.ones(3, HIDDEN - 1, dtype=torch.bfloat16))
    with pytest.raises(LaneError, match="no whole rows"):
        here.combine((3, HIDDEN - 1), torch.float32)
    with pytest.raises(LaneError, match="not \\(3, 48\\)"):
        here.combine((3, HIDDEN), torch.bfloat16)
    assert here.combine((3, HIDDEN - 1), torch.bfloat16).sum() == 3 * (HIDDEN - 1)


def test_one_dispatch_is_outstanding_at_most(attention, ffn):
    here, there = attention.attention_link(0, 0), ffn.ffn_link(0, 0)
    for premature in (
        lambda: here.combine((1, HIDDEN), torch.float32),
        lambda: there.hidden(torch.float32),
        lambda: there.reply(torch.zeros(1, HIDDEN)),
    ):
        with pytest.raises(LaneError, match="lane 0"):
            premature()
    here.dispatch(header(1), torch.zeros(1, HIDDEN))
    with pytest.raises(LaneError, match="outstanding"):
        here.dispatch(header(1), torch.zeros(1, HIDDEN))
    with pytest.raises(LaneError, match="nothing to combine"):
        here.combine((1, HIDDEN), torch.float32)
    there.poll()
    there.reply(torch.zeros(1, HIDDEN))
    with pytest.raises(LaneError, match="outstanding"):
        here.dispatch(header(1), torch.zeros(1, HIDDEN))
    with pytest.raises(LaneError, match="no dispatch to reply to"):
        there.reply(torch.zeros(1, HIDDEN))


def test_a_new_ffn_rank_finds_the_unanswered_dispatch(attention, ffn, fd, deployment):
    here = attention.attention_link(0, 0)
    here.dispatch(header(2, layer=5), torch.full((2, HIDDEN), 4.0))
    assert ffn.ffn_link(0, 0).poll() is not None  # ... and its process dies
    successor = SharedMemoryTransport(fd, deployment, Device("cpu:1")).ffn_link(0, 0)
    assert successor.poll() == header(2, layer=5)
    successor.reply(successor.hidden(torch.float32) + 1)
    assert (here.combine((2, HIDDEN), torch.float32) == 5).all()


def test_a_new_attention_rank_waits_for_the_answer_to_its_predecessor(
    attention, ffn, fd, deployment
):
    attention.attention_link(0, 0).dispatch(header(1), torch.zeros(1, HIDDEN))
    successor = SharedMemoryTransport(fd, deployment, Device("cpu:0")).attention_link(0, 0)
    with pytest.raises(LaneError, match="outstanding"):
        successor.dispatch(header(1, epoch=1), torch.zeros(1, HIDDEN))
    there = ffn.ffn_link(0, 0)
    there.poll()
    there.reply(torch.zeros(1, HIDDEN))
    assert not successor.ready()
    successor.dispatch(header(1, epoch=1), torch.ones(1, HIDDEN))
    assert there.poll() == header(1, epoch=1)


def test_a_dispatch_can_be_refused(attention, ffn):
    """The lane is free again, as after a reply, and the next dispatch is not refused with it."""
    here, there = attention.attention_link(0, 0), ffn.ffn_link(0, 0)
    with pytest.raises(LaneError, match="no dispatch to refuse"):
        there.refuse()
    here.dispatch(header(2), torch.ones(2, HIDDEN))
    assert there.poll() == header(2)
    there.refuse()
    assert there.poll() is None
    assert here.ready() and here.take_refusal() and here.free
    here.dispatch(header(2), torch.ones(2, HIDDEN))
    assert there.poll() == header(2)
    there.reply(torch.full((2, HIDDEN), 3.0))
    assert here.ready() and not here.take_refusal()
    assert (here.combine((2, HIDDEN), torch.float32) == 3).all()


def test_every_pair_and_lane_has_its_own_link():
    deployment = deployment_of(("cpu:0", "cpu:1"), ("cpu:1", "cpu:2", "cpu:3"), lanes=3)
    fd = shared_memory.create(deployment, HIDDEN * 4)
    transports = {d: SharedMemoryTransport(fd, deployment, d) for d in deployment.devices}
    os.close(fd)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    keys = [(a, lane, f) for a, f in pairs for lane in range(3)]
    senders, receivers = {}, {}
    for a, lane, f in keys:
        senders[a, lane, f] = transports[deployment.kv_pool_devices[a]].attention_link(lane, f)
        receivers[a, lane, f] = transports[deployment.weight_pool_devices[f]].ffn_link(a, lane)
    for number, key in enumerate(keys):
        link = senders[key]
        assert (link.attention_rank, link.lane, link.ffn_rank) == key
        rows = torch.full((deployment.max_step_tokens, HIDDEN), float(number))
        link.dispatch(header(len(rows), layer=number), rows)
    for number, key in enumerate(keys):
        link = receivers[key]
        assert (link.attention_rank, link.lane, link.ffn_rank) == key
        assert link.poll().layer == number
        link.reply(link.hidden(torch.float32) + 100)
    for number, key in enumerate(keys):
        shape = (deployment.max_step_tokens, HIDDEN)
        assert (senders[key].combine(shape, torch.float32) == number + 100).all()
    with pytest.raises(ValueError, match="on one device"):
        transports[Device("cpu:1")].attention_link(0, 0)
    with pytest.raises(ValueError, match="no rank of this pool"):
        transports[Device("cpu:0")].ffn_link(0, 0)
    with pytest.raises(ValueError, match="lane 3 of 3"):
        transports[Device("cpu:0")].attention_link(3, 0)


def test_one_device_needs_no_segment():
    deployment = deployment_of(("cpu:0",), ("cpu:0",))
    with pytest.raises(ValueError, match="no two ranks on different devices"):
        shared_memory.create(deployment, HIDDEN * 4)


def test_a_segment_of_another_deployment_is_refused(fd, deployment):
    for other in (
        msgspec.structs.replace(deployment, lanes=3),
        msgspec.structs.replace(deployment, max_running_requests=5),
        deployment_of(("cpu:0", "cpu:2"), ("cpu:1",)),
    ):
        with pytest.raises(LaneError, match="another deployment"):
            SharedMemoryTransport(fd, other, Device("cpu:0"))
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    empty = os.memfd_create("empty")
    with pytest.raises(LaneError, match="too short"):
        SharedMemoryTransport(empty, deployment, Device("cpu:0"))
    os.close(empty)


def test_a_wait_without_a_ring_lasts_its_time(ffn):
    begin = time.monotonic()
    assert ffn.wait(0.05) is False
    assert time.monotonic() - begin >= 0.05
    assert ffn.wait(0.0) is False


def test_a_ring_between_polling_and_waiting_is_not_lost(attention, ffn):
    here, there = attention.attention_link(0, 0), ffn.ffn_link(0, 0)
    for _ in range(20):
        assert there.poll() is None
        here.dispatch(header(1), torch.zeros(1, HIDDEN))  # after the poll, before the wait
        begin = time.monotonic()
        assert ffn.wait(30.0) is True
        assert time.monotonic() - begin < 10.0
        assert there.poll() is not None
        there.reply(torch.zeros(1, HIDDEN))
        assert attention.wait(30.0) is True
        here.combine((1, HIDDEN), torch.float32)


@pytest.mark.parametrize("spin_ns", [0, 50_000_000])
def test_a_sleeper_is_woken(fd, deployment, spin_ns):
    transport = SharedMemoryTransport(fd, deployment, Device("cpu:1"), spin_ns)
    peer = SharedMemoryTransport(fd, deployment, Device("cpu:0")).attention_link(0, 0)
    timer = threading.Timer(0.02, peer.dispatch, (header(1), torch.zeros(1, HIDDEN)))
    begin = time.monotonic()
    timer.start()
    assert transport.wait(30.0) is True
    assert time.monotonic() - begin < 10.0
    timer.join()


@pytest.mark.parametrize("spin_ns", [0, 20_000])
def test_two_processes_exchange_20000_dispatches(spin_ns):
    """Half of the rounds have each spin; several lanes are in flight, and contents are checked
    on return."""
    deployment = deployment_of(("cpu:0",), ("cpu:1",), lanes=4)
    rounds = 10_000 // deployment.lanes
    fd = shared_memory.create(deployment, HIDDEN * 4)
    arguments = [str(fd), msgspec.json.encode(deployment).decode(), str(rounds), str(spin_ns)]
    peer = subprocess.Popen(
        [sys.executable, str(PEER), *arguments], pass_fds=(fd,), stdout=subprocess.PIPE, text=True
    )
    try:
        transport = SharedMemoryTransport(fd, deployment, Device("cpu:0"), spin_ns)
        os.close(fd)
        links = [transport.attention_link(lane, 0) for lane in range(deployment.lanes)]
        exchange(transport, links, rounds)
        output, _ = peer.communicate(timeout=60)
    finally:
        peer.kill()
        peer.wait()
    assert peer.returncode == 0
    assert output.strip() == str([link.counters.rows for link in links])
    assert all(link.counters.dispatches == rounds for link in links)


def exchange(transport, links, rounds):
    """Keeps every lane busy; every lane sends its own sequence of small integers."""
    choose = random.Random(3)
    sent = [0] * len(links)
    expected = [torch.empty(0)] * len(links)
    running = len(links)
    first = True
    while running:
        news = False
        for lane, link in enumerate(links):
            if sent[lane] > rounds or not (first or link.ready()):
                continue
            news = True
            if not first:
                wanted = expected[lane]
                assert torch.equal(link.combine(wanted.shape, wanted.dtype), wanted)
            sent[lane] += 1
            if sent[lane] > rounds:
                running -= 1
                continue
            model, layer, rows = choose.randrange(2), choose.randrange(8), choose.randint(1, 16)
            dtype = (torch.float32, torch.bfloat16)[model]
            hidden = (torch.arange(rows * HIDDEN) % 16 + sent[lane] % 8).view(rows, HIDDEN)
            hidden = hidden.to(dtype)
            expected[lane] = hidden * 2 + (layer + lane / 4)
            link.dispatch(header(rows, layer, model), hidden)
        first = False
        if running and not news:
            assert transport.wait(60.0), "lost wake-up, or the FFN rank is gone"
