"""The native connection of a link over loopback sockets: whatever pieces bytes come in, wherever
connections break and processes end, and whatever a peer sends."""

from __future__ import annotations

import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from crosspool.kernels.native import Doorbell
from crosspool.kernels.network import LossReason
from crosspool.transport.data_path import DispatchHeader
from crosspool.transport.lane_layout import LinkLayout
from support.network_ends import AttentionSide, End, FFNSide
from support.wires import Wire, tcp_pair

HIDDEN = 24
LAYOUT = LinkLayout(max_rows=16, max_row_bytes=HIDDEN * 4)
HEADER = struct.Struct("<IIQQIIII")
"""Kind, model, sequence, epoch, layer, rows, row bytes, reserved."""
STATE, DISPATCH, REPLY = 1, 2, 3
UNHEARD = 2**64 - 1


def rows_of(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def reply_to(header: DispatchHeader, hidden: torch.Tensor) -> torch.Tensor:
    return hidden * 2 + header.layer


@pytest.fixture
def attention() -> Iterator[AttentionSide]:
    end = AttentionSide(LAYOUT)
    yield end
    end.close()


@pytest.fixture
def ffn() -> Iterator[FFNSide]:
    end = FFNSide(LAYOUT)
    yield end
    end.close()


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline


def until_lost(end: End, before: int) -> None:
    """Looks until more connections have ended than ``before``."""
    until(lambda: end.connection.progress() or end.connection.status().losses > before)


def joined(attention: AttentionSide, ffn: FFNSide) -> None:
    here, there = tcp_pair()
    attention.take(here)
    ffn.take(there)
    until(lambda: not ffn.connection.progress() and attention.link.free)


def test_a_round_trip_carries_rows_both_ways(attention: AttentionSide, ffn: FFNSide) -> None:
    assert not attention.link.free, "nothing is known of the peer yet"
    joined(attention, ffn)
    for number, dtype in enumerate((torch.float32, torch.bfloat16), 1):
        hidden = rows_of(5, number).to(dtype)
        header = DispatchHeader(epoch=9, model=7, layer=3, rows=5)
        attention.link.dispatch(header, hidden)
        until(lambda: ffn.link.poll() is not None)
        assert ffn.link.poll() == header
        assert torch.equal(ffn.link.hidden(dtype), hidden)
        assert not attention.link.ready()
        ffn.link.reply(hidden * 3)
        assert ffn.link.poll() is None
        until(attention.link.ready)
        assert torch.equal(attention.link.combine((5, HIDDEN), dtype), hidden * 3)
        assert attention.signals == ffn.signals == (number, number)
    assert attention.link.counters == ffn.link.counters


def test_a_refusal_ends_the_dispatch(attention: AttentionSide, ffn: FFNSide) -> None:
    joined(attention, ffn)
    attention.link.dispatch(DispatchHeader(epoch=1, model=0, layer=0, rows=2), rows_of(2, 1))
    until(lambda: ffn.link.poll() is not None)
    ffn.link.refuse()
    until(attention.link.ready)
    assert attention.link.take_refusal()
    assert attention.link.free


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_lost_wherever_connections_and_processes_end(seed: int) -> None:
    """Bytes come in random pieces. Connections are cut at any byte, and either end is replaced by
    a new process with empty memory. Every dispatch is replied to, and its reply is its own."""
    generator = random.Random(seed)
    ends: list[End] = []

    def made(kind: type[AttentionSide] | type[FFNSide]) -> AttentionSide | FFNSide:
        ends.append(kind(LAYOUT))
        return ends[-1]

    attention, ffn = made(AttentionSide), made(FFNSide)
    wires: list[Wire] = []

    def connect() -> None:
        if wires:
            wires[-1].cut()
        wires.append(Wire(generator))
        attention.take(wires[-1].here)
        ffn.take(wires[-1].there)

    connect()
    epoch, done, out, cuts = 1, 0, False, 0
    count = 3
    for _ in itertools.count():
        wires[-1].carry(generator.choice((40, 400, 4000)))
        if not out and attention.link.free:
            count = generator.randint(1, LAYOUT.max_rows)
            header = DispatchHeader(epoch=epoch, model=done % 5, layer=done, rows=count)
            attention.link.dispatch(header, rows_of(count, done))
            out = True
        polled = ffn.link.poll()
        if polled is not None and generator.random() < 0.7:
            ffn.link.reply(reply_to(polled, ffn.link.hidden(torch.float32)))
        if out and attention.link.ready():
            partial = attention.link.combine((count, HIDDEN), torch.float32)
            assert torch.equal(partial, reply_to(header, rows_of(count, done)))
            done, out = done + 1, False
            if done == 60:
                break
        chance = generator.random()
        if chance < 0.02:
            connect()
            cuts += 1
        elif chance < 0.03:
            ffn = made(FFNSide)
            connect()
        elif chance < 0.04:
            attention, epoch, out = made(AttentionSide), epoch + 1, False
            connect()
    assert cuts > 3
    for end in ends:
        assert LossReason(end.connection.status().reason) in (
            LossReason.NONE,
            LossReason.CLOSED,
            LossReason.SYSTEM,
        )
        end.close()


def message(kind: int, sequence: int, epoch: int, rows: int = 0, **fields: int) -> bytes:
    """A message with rows of zeros."""
    row_bytes = fields.get("row_bytes", HIDDEN * 4 if rows else 0)
    head = HEADER.pack(
        *(kind, fields.get("model", 0), sequence, epoch, fields.get("layer", 0)),
        *(rows, row_bytes, fields.get("reserved", 0)),
    )
    return head + bytes(fields.get("sent", rows * row_bytes))


FRESH = message(STATE, 0, UNHEARD)
TO_FFN: dict[str, tuple[list[bytes], LossReason]] = {
    "no kind": ([FRESH, message(9, 1, 1, 2)], LossReason.MALFORMED),
    "a second state": ([FRESH, FRESH], LossReason.MALFORMED),
    "a reply": ([FRESH, message(REPLY, 1, 1, 2)], LossReason.MALFORMED),
    "before its state": ([message(DISPATCH, 1, 1, 2)], LossReason.MALFORMED),
    "reserved": ([FRESH, message(DISPATCH, 1, 1, 2, reserved=1)], LossReason.MALFORMED),
    "a state with rows": ([message(STATE, 0, 0, 2)], LossReason.MALFORMED),
    "a state of a model": ([message(STATE, 0, 0, model=1)], LossReason.MALFORMED),
    "longer than its rows": ([FRESH, message(DISPATCH, 1, 1, 2) + b"x"], LossReason.MALFORMED),
    "number 0": ([FRESH, message(DISPATCH, 0, 1, 2)], LossReason.NUMBER),
    "epoch 0": ([FRESH, message(DISPATCH, 1, 0, 2)], LossReason.NUMBER),
    "no rows": ([FRESH, message(DISPATCH, 1, 1, 0)], LossReason.ROWS),
    "too many rows": ([FRESH, message(DISPATCH, 1, 1, 17, row_bytes=4)], LossReason.ROWS),
    "too wide rows": (
        [FRESH, message(DISPATCH, 1, 1, 1, row_bytes=HIDDEN * 4 + 1)],
        LossReason.ROWS,
    ),
    "as large as can be": (
        [FRESH, message(DISPATCH, 1, 1, 2**32 - 1, row_bytes=2**32 - 1, sent=8)],
        LossReason.ROWS,
    ),
    "a state that cannot be": ([message(STATE, 3, 5)], LossReason.NUMBER),
    "new, with a number": ([message(STATE, 3, UNHEARD)], LossReason.NUMBER),
}


@pytest.mark.parametrize("what", TO_FFN)
def test_an_ffn_rank_ends_a_connection_that_breaks_the_protocol(what: str, ffn: FFNSide) -> None:
    messages, reason = TO_FFN[what]
    here, there = tcp_pair()
    ffn.take(there)
    for one in messages[:-1]:
        here.sendall(one)
        until(lambda: ffn.connection.progress() or bool(ffn.connection.status().open))
    here.sendall(messages[-1])
    until_lost(ffn, 0)
    assert ffn.connection.status().reason == reason
    assert ffn.signals == (0, 0)
    assert ffn.link.poll() is None
    here.close()


def test_a_dispatch_must_be_due_and_of_the_connections_epoch(ffn: FFNSide) -> None:
    here, there = tcp_pair()
    ffn.take(there)
    here.sendall(FRESH + message(DISPATCH, 4, 8, 2))
    until(lambda: ffn.link.poll() is not None)
    assert ffn.signals == (4, 3)
    here.sendall(message(DISPATCH, 5, 8, 2))
    until_lost(ffn, 0)
    assert ffn.connection.status().reason == LossReason.UNASKED
    here.close()
    for number, epoch in ((6, 8), (4, 8), (6, 9)):
        here, there = tcp_pair()
        ffn.take(there)
        here.sendall(message(STATE, 4, 3))
        until(lambda: ffn.connection.progress() or bool(ffn.connection.status().open))
        if ffn.link.poll() is not None:
            ffn.link.reply(torch.zeros(2, HIDDEN))
        if epoch == 9:
            here.sendall(message(DISPATCH, 5, 8, 1))
            until(lambda: ffn.link.poll() is not None)
            ffn.link.reply(torch.zeros(1, HIDDEN))
        before = ffn.signals
        losses = ffn.connection.status().losses
        here.sendall(message(DISPATCH, number, epoch, 1))
        until_lost(ffn, losses)
        assert ffn.connection.status().reason == LossReason.NUMBER
        assert ffn.signals == before
        here.close()


TO_ATTENTION: dict[str, tuple[bytes, LossReason]] = {
    "a dispatch": (message(DISPATCH, 1, 7, 2), LossReason.MALFORMED),
    "another number": (message(REPLY, 2, 7, 2), LossReason.NUMBER),
    "another epoch": (message(REPLY, 1, 6, 2), LossReason.NUMBER),
    "fewer rows": (message(REPLY, 1, 7, 1), LossReason.ROWS),
    "more rows": (message(REPLY, 1, 7, 3), LossReason.ROWS),
    "narrower rows": (message(REPLY, 1, 7, 2, row_bytes=HIDDEN * 2), LossReason.ROWS),
    "of a model": (message(REPLY, 1, 7, 2, model=1), LossReason.MALFORMED),
    "half a refusal": (message(REPLY, 1, 7, 0, row_bytes=4), LossReason.ROWS),
}


@pytest.mark.parametrize("what", TO_ATTENTION)
def test_an_attention_rank_ends_a_connection_that_breaks_the_protocol(
    what: str, attention: AttentionSide, ffn: FFNSide
) -> None:
    wrong, reason = TO_ATTENTION[what]
    here, there = tcp_pair()
    attention.take(there)
    here.sendall(message(STATE, 0, 0))
    until(lambda: attention.link.free)
    hidden = rows_of(2, 1)
    attention.link.dispatch(DispatchHeader(epoch=7, model=0, layer=0, rows=2), hidden)
    here.sendall(wrong)
    until_lost(attention, 0)
    assert attention.connection.status().reason == reason
    assert attention.signals == (1, 0)
    here.close()
    # The dispatch is not lost: the next connection carries it.
    joined_here, joined_there = tcp_pair()
    attention.take(joined_here)
    ffn.take(joined_there)
    until(lambda: not attention.connection.progress() and ffn.link.poll() is not None)
    assert torch.equal(ffn.link.hidden(torch.float32), hidden)


def test_an_unasked_reply_ends_the_connection(attention: AttentionSide) -> None:
    here, there = tcp_pair()
    attention.take(there)
    here.sendall(message(STATE, 0, 0))
    until(lambda: attention.link.free)
    here.sendall(message(REPLY, 0, 0))
    until_lost(attention, 0)
    assert attention.connection.status().reason == LossReason.UNASKED
    assert attention.link.free
    here.close()


def test_a_peer_that_dies_within_a_message_leaves_no_trace(ffn: FFNSide) -> None:
    whole = message(DISPATCH, 1, 7, 16)
    for cut in (1, HEADER.size - 1, HEADER.size, HEADER.size + 1, len(whole) - 1):
        here, there = tcp_pair()
        ffn.take(there)
        here.sendall(FRESH + whole[:cut])
        here.close()
        losses = ffn.connection.status().losses
        until_lost(ffn, losses)
        assert ffn.connection.status().reason == LossReason.CLOSED
        assert ffn.link.poll() is None
    here, there = tcp_pair()
    ffn.take(there)
    here.sendall(FRESH + whole)
    until(lambda: ffn.link.poll() is not None)
    here.close()


def test_random_bytes_change_nothing(ffn: FFNSide) -> None:
    generator = random.Random(5)
    for losses in range(200):
        here, there = tcp_pair()
        ffn.take(there)
        head = FRESH if generator.random() < 0.5 else b""
        here.sendall(head + generator.randbytes(generator.randint(1, 300)))
        here.close()
        until_lost(ffn, losses)
        assert ffn.signals == (0, 0)


def test_a_large_message_passes_through_small_socket_buffers() -> None:
    layout = LinkLayout(max_rows=256, max_row_bytes=4096)
    attention, ffn = AttentionSide(layout), FFNSide(layout)
    here, there = tcp_pair()
    for end in (here, there):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    attention.take(here)
    ffn.take(there)
    until(lambda: not ffn.connection.progress() and attention.link.free)
    hidden = torch.randn(256, 1024)
    attention.link.dispatch(DispatchHeader(epoch=1, model=0, layer=0, rows=256), hidden)
    until(lambda: not attention.connection.progress() and ffn.link.poll() is not None)
    assert torch.equal(ffn.link.hidden(torch.float32), hidden)
    ffn.link.reply(-hidden)
    until(lambda: not ffn.connection.progress() and attention.link.ready())
    assert torch.equal(attention.link.combine((256, 1024), torch.float32), -hidden)
    attention.close()
    ffn.close()


@pytest.mark.parametrize("spin_ns", [0, 2_000_000_000])
def test_a_wait_ends_with_a_message_with_a_ring_and_in_time(
    spin_ns: int, attention: AttentionSide, ffn: FFNSide
) -> None:
    joined(attention, ffn)
    assert not ffn.network.wait(0, 1_000_000) or not ffn.network.wait(0, 1_000_000)
    header = DispatchHeader(epoch=1, model=0, layer=0, rows=2)
    acts: list[Callable[[], object]] = [
        lambda: attention.link.dispatch(header, rows_of(2, 1)),
        Doorbell(ffn.doorbell).ring,
    ]
    for act in acts:
        thread = threading.Timer(0.05, act)
        thread.start()
        assert ffn.network.wait(spin_ns, 60_000_000_000)
        thread.join()
    assert ffn.link.poll() == header


def test_a_lost_peer_ends_a_wait(attention: AttentionSide, ffn: FFNSide) -> None:
    joined(attention, ffn)
    until(lambda: not ffn.network.wait(0, 1_000_000))
    thread = threading.Timer(0.05, attention.close)
    thread.start()
    until(lambda: ffn.network.wait(0, 60_000_000_000) and ffn.connection.status().losses > 0)
    thread.join()
