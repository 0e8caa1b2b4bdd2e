"""Processes of one host exchange bytes and file descriptors, and nobody waits for ever."""

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
from crosspool.transport.rendezvous import Brought, RendezvousError, exchange

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
    address: Path, me: str, payload: str, *sizes: int, members: Sequence[str] = MEMBERS
) -> subprocess.Popen[str]:
    words = [str(address), me, ",".join(members), payload, *map(str, sizes)]
    return subprocess.Popen([sys.executable, str(PEER), *words], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("here", [0, 2], ids=["leads", "follows"])
def test_three_processes_tell_each_other(address, here):
    peers = [
        peer(address, name, f"from-{name}", *[4] * number)
        for number, name in enumerate(MEMBERS)
        if number != here
    ]
    memory = os.memfd_create("mine")
    os.write(memory, b"mine")
    mine = Brought(b"id" * 64, [memory])
    try:
        with exchange(address, MEMBERS[here], MEMBERS, mine, 30.0) as found:
            assert sorted(found) == MEMBERS
            assert found[MEMBERS[here]].payload == b"id" * 64
            for number, name in enumerate(MEMBERS):
                brought = found[name]
                assert not any(os.get_inheritable(fd) for fd in brought.descriptors)
                if number != here:
                    assert brought.payload.decode() == f"from-{name}"
                    read = [os.pread(fd, 100, 0) for fd in brought.descriptors]
                    assert read == [str(number).encode() * 4] * number
        for process in peers:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            assert f"{MEMBERS[here]} {'id' * 64} mine" in said.splitlines()
        if here == 0:  # the peers wrote into the memory that was brought
            assert os.pread(memory, 100, 0) == b"mine\x0012"
    finally:
        os.close(memory)
    assert not address.exists()


def in_thread(*arguments) -> tuple[threading.Thread, list[object]]:
    got: list[object] = []

    def run() -> None:
        try:
            with exchange(*arguments) as found:
                got.append({name: brought.payload for name, brought in found.items()})
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


def test_one_member_is_enough(address):
    with exchange(address, "cuda:0", ["cuda:0"], Brought(b"x"), 1.0) as found:
        assert found["cuda:0"].payload == b"x"


def test_who_is_missing_is_named(address):
    began = time.monotonic()
    thread, got = in_thread(address, "cuda:1", MEMBERS, Brought(), 1.5)
    with (
        pytest.raises(RendezvousError, match=r"^cuda:2 did not come to .*/peers in time"),
        exchange(address, "cuda:0", MEMBERS, Brought(), 1.0),
    ):
        pass
    thread.join()
    assert isinstance(got[0], RendezvousError)
    assert time.monotonic() - began < 5
    with (
        pytest.raises(RendezvousError, match=r"cuda:0 does not listen at .* in time"),
        exchange(address, "cuda:1", MEMBERS, Brought(), 0.2),
    ):
        pass


@pytest.mark.parametrize("stranger", ["cuda:7", "cuda:0"])
def test_who_is_no_member_or_comes_twice_is_refused(address, stranger):
    thread, got = in_thread(address, stranger, ["cuda:0 leads", stranger], Brought(), 5.0)
    with (
        pytest.raises(RendezvousError, match=f"{stranger} came to .*, of cuda:1"),
        exchange(address, "cuda:0", MEMBERS, Brought(), 5.0),
    ):
        pass
    thread.join()
    assert isinstance(got[0], RendezvousError)


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"CPPEERS2" + bytes(8),
        msgspec.msgpack.encode(("cuda:1", 0, b"12345"))[:-1],
        msgspec.msgpack.encode(("cuda:1", 1, b"")),
        b"",
    ],
    ids=["short", "version", "length", "descriptors", "nothing"],
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
                socket.send_fds(other, [packet], [0] if packet == b"x" else [])

    thread = threading.Thread(target=send)
    thread.start()
    with (
        pytest.raises(RendezvousError, match=r"a packet came|left before"),
        exchange(address, "cuda:0", MEMBERS, Brought(), 5.0),
    ):
        pass
    thread.join()


def test_another_user_is_refused(address, monkeypatch):
    thread, got = in_thread(address, "cuda:1", MEMBERS[:2], Brought(), 5.0)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with (
        pytest.raises(RendezvousError, match=f"a process of user {user} came"),
        exchange(address, "cuda:0", MEMBERS[:2], Brought(), 5.0),
    ):
        pass
    thread.join()
    assert isinstance(got[0], RendezvousError)


@pytest.mark.parametrize("mine", [Brought(bytes(60_001)), Brought(b"", [0] * 65)])
def test_too_much_is_refused(address, mine):
    with (
        pytest.raises(ValueError, match="at most 60000 and 64"),
        exchange(address, "cuda:0", ["cuda:0"], mine, 1.0),
    ):
        pass


def test_as_much_as_may_be_arrives(address):
    largest = bytes(range(256)) * 234
    thread, got = in_thread(address, "cuda:1", MEMBERS[:2], Brought(largest), 10.0)
    with exchange(address, "cuda:0", MEMBERS[:2], Brought(largest, [0] * 64), 10.0) as found:
        assert found["cuda:1"].payload == largest
    thread.join()
    assert got == [{"cuda:0": largest, "cuda:1": largest}]


def test_a_leader_that_was_killed_leaves_nothing_in_the_way(address):
    """Processes that meet again do so at the same address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(address))
    assert address.exists()
    process = peer(address, "cuda:1", "there", members=MEMBERS[:2])
    with exchange(address, "cuda:0", MEMBERS[:2], Brought(b"here"), 30.0) as found:
        assert found["cuda:1"].payload == b"there"
    process.communicate(timeout=60)
