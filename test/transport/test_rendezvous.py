"""Processes of one host exchange bytes, and nobody waits for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from crosspool.transport.rendezvous import RendezvousError, exchange

PEER = Path(__file__).with_name("rendezvous_peer.py")
MEMBERS = ["cuda:0", "cuda:1", "cuda:2"]


@pytest.fixture
def address(tmp_path):
    return tmp_path / "peers"


@pytest.fixture(autouse=True)
def _no_descriptor_is_left():
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def peer(
    address: Path, me: str, mine: str, members: Sequence[str] = MEMBERS
) -> subprocess.Popen[str]:
    words = [str(address), me, ",".join(members), mine]
    return subprocess.Popen([sys.executable, str(PEER), *words], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("here", [0, 2], ids=["leads", "follows"])
def test_three_processes_tell_each_other(address, here):
    others = [name for name in MEMBERS if name != MEMBERS[here]]
    peers = [peer(address, name, f"from-{name}") for name in others]
    found = exchange(address, MEMBERS[here], MEMBERS, b"id" * 64, 30.0)
    told = {MEMBERS[here]: "id" * 64} | {name: f"from-{name}" for name in others}
    assert {name: brought.decode() for name, brought in found.items()} == told
    for process in peers:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert dict(line.split() for line in said.splitlines()) == told
    assert not address.exists()


def in_thread(*arguments) -> tuple[threading.Thread, list[object]]:
    got: list[object] = []

    def run() -> None:
        try:
            got.append(exchange(*arguments))
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


def test_one_member_is_enough(address):
    assert exchange(address, "cuda:0", ["cuda:0"], b"x", 1.0) == {"cuda:0": b"x"}


def test_who_is_missing_is_named(address):
    began = time.monotonic()
    thread, got = in_thread(address, "cuda:1", MEMBERS, b"", 1.5)
    with pytest.raises(RendezvousError, match=r"^cuda:2 did not come to .*/peers in time"):
        exchange(address, "cuda:0", MEMBERS, b"", 1.0)
    thread.join()
    assert isinstance(got[0], RendezvousError)
    assert time.monotonic() - began < 20
    with pytest.raises(RendezvousError, match=r"cuda:0 does not listen at .* in time"):
        exchange(address, "cuda:1", MEMBERS, b"", 0.2)


@pytest.mark.parametrize("stranger", ["cuda:7", "cuda:0"])
def test_who_is_no_member_or_comes_twice_is_refused(address, stranger):
    thread, got = in_thread(address, stranger, ["cuda:0 leads", stranger], b"", 5.0)
    with pytest.raises(RendezvousError, match=f"{stranger} came to .*, of cuda:1"):
        exchange(address, "cuda:0", MEMBERS, b"", 5.0)
    thread.join()
    assert isinstance(got[0], RendezvousError)


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"CPPEERS2" + bytes(8),
        msgspec.msgpack.encode(("cuda:1", b"12345"))[:-1],
        msgspec.msgpack.encode(("cuda:1", bytes(100_000))),
        b"",
    ],
    ids=["short", "version", "length", "too long", "nothing"],
)
def test_a_packet_that_is_none_of_ours_is_refused(address, packet):
    def send() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            while True:
                try:
                    other.connect(str(address))
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    time.sleep(0.01)
            if packet:
                other.send(packet)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(RendezvousError, match=r"a packet came|left before"):
        exchange(address, "cuda:0", MEMBERS, b"", 5.0)
    thread.join()


def test_another_user_is_refused(address, monkeypatch):
    thread, got = in_thread(address, "cuda:1", MEMBERS[:2], b"", 5.0)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(RendezvousError, match=f"a process of user {user} came"):
        exchange(address, "cuda:0", MEMBERS[:2], b"", 5.0)
    thread.join()
    assert isinstance(got[0], RendezvousError)


def test_too_much_is_refused(address):
    with pytest.raises(ValueError, match="60001 bytes: at most 60000"):
        exchange(address, "cuda:0", ["cuda:0"], bytes(60_001), 1.0)


def test_as_much_as_may_be_arrives(address):
    largest = bytes(range(256)) * 234
    thread, got = in_thread(address, "cuda:1", MEMBERS[:2], largest, 10.0)
    both = {"cuda:0": largest, "cuda:1": largest}
    assert exchange(address, "cuda:0", MEMBERS[:2], largest, 10.0) == both
    thread.join()
    assert got == [both]


def test_a_leader_that_was_killed_leaves_nothing_in_the_way(address):
    """Processes that meet again do so at the same address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(address))
    assert address.exists()
    process = peer(address, "cuda:1", "there", members=MEMBERS[:2])
    assert exchange(address, "cuda:0", MEMBERS[:2], b"here", 30.0)["cuda:1"] == b"there"
    process.communicate(timeout=60)
