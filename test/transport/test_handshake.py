"""Both ends of a connection between hosts prove themselves: over loopback sockets, to each other
and to those who do not know the key."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
from typing import Any

import pytest
from crosspool.transport import handshake
from crosspool.transport.handshake import (
    Credentials,
    Greeted,
    HandshakeError,
    LinkName,
    accept,
    connect,
)
from support.wires import tcp_pair

LINK = LinkName(attention_rank=1, lane=0, ffn_rank=2)
OWN = Credentials(
    key=bytes(range(32)), deployment=b"d" * 16, max_rows=64, max_row_bytes=4096, incarnation=3
)
Outcome = Greeted | BaseException


def ends(
    client: Credentials,
    server: Credentials,
    *,
    link: LinkName = LINK,
    latest_ffn: int = 0,
    latest_attention: int = 0,
    known: bool = True,
) -> tuple[Outcome, Outcome]:
    """What becomes of the attention rank's end and of the FFN rank's end."""

    async def both() -> list[Outcome]:
        here, there = tcp_pair()
        with here, there:
            return await asyncio.gather(
                connect(here, client, link, latest=latest_ffn),
                accept(
                    there,
                    server,
                    lambda asked: latest_attention if known and asked == LINK else None,
                ),
                return_exceptions=True,
            )

    outcomes = asyncio.run(asyncio.wait_for(both(), 30))
    return outcomes[0], outcomes[1]


def changed(**fields: Any) -> Credentials:
    return dataclasses.replace(OWN, **fields)


def test_ends_of_one_deployment_welcome_each_other() -> None:
    assert ends(OWN, changed(incarnation=7), latest_ffn=7, latest_attention=3) == (
        Greeted(LINK, 7),
        Greeted(LINK, 3),
    )


@pytest.mark.parametrize(
    ("client", "more", "said"),
    [
        (changed(key=bytes(32)), {}, "their keys differ: give all hosts the same key file"),
        (changed(deployment=b"e" * 16), {}, "different deployments, or to different starts"),
        (changed(max_rows=65), {}, "room for different rows"),
        (changed(max_row_bytes=8192), {}, "room for different rows"),
        (OWN, {"link": LinkName(1, 1, 2)}, "there is no such link"),
        (OWN, {"known": False}, "there is no such link"),
        (OWN, {"latest_attention": 4}, "a later process of the same rank"),
    ],
)
def test_both_ends_say_why_one_refuses(client: Credentials, more: Any, said: str) -> None:
    here, there = ends(client, OWN, **more)
    for outcome in (here, there):
        assert isinstance(outcome, HandshakeError)
        assert said in str(outcome)
        assert "refuses" in str(outcome)


def test_an_earlier_ffn_rank_is_refused() -> None:
    here, there = ends(OWN, OWN, latest_ffn=4)
    for outcome in (here, there):
        assert isinstance(outcome, HandshakeError)
        assert "a later process of the same rank" in str(outcome)


def test_versions_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    greet = handshake._greeting

    def greet_as_the_next(own: Credentials, link: LinkName) -> bytes:
        greeting = bytearray(greet(own, link))
        if own is not OWN:
            greeting[8] += 1
        return bytes(greeting)

    monkeypatch.setattr(handshake, "_greeting", greet_as_the_next)
    here, there = ends(changed(incarnation=4), OWN)
    assert isinstance(there, HandshakeError) and "versions differ" in str(there)
    assert isinstance(here, HandshakeError) and "versions differ" in str(here)


def test_credentials_have_whole_keys_and_show_none() -> None:
    assert "0001" not in repr(OWN) and "x01" not in repr(OWN)
    with pytest.raises(ValueError, match="key has 31 bytes, not 32"):
        changed(key=bytes(31))
    with pytest.raises(ValueError, match="deployment has 0 bytes, not 16"):
        changed(deployment=b"")


class Recorder:
    """A man in the middle who passes everything on and remembers it."""

    def __init__(self) -> None:
        self.here, self._near = tcp_pair()
        self.there, self._far = tcp_pair()
        self.from_client = b""
        self.from_server = b""

    async def work(self) -> None:
        async def pump(source: socket.socket, target: socket.socket) -> bytes:
            loop, seen = asyncio.get_running_loop(), b""
            while some := await loop.sock_recv(source, 4096):
                seen += some
                await loop.sock_sendall(target, some)
            return seen

        self.from_client, self.from_server = await asyncio.gather(
            pump(self._near, self._far), pump(self._far, self._near)
        )

    def close(self) -> None:
        for end in (self.here, self.there, self._near, self._far):
            end.close()


def recorded() -> Recorder:
    """What crosses when both ends are welcome."""
    middle = Recorder()

    async def all_three() -> None:
        work = asyncio.create_task(middle.work())
        await asyncio.gather(
            connect(middle.here, OWN, LINK), accept(middle.there, OWN, lambda link: 0)
        )
        middle.here.close()
        middle.there.close()
        await work

    asyncio.run(asyncio.wait_for(all_three(), 30))
    middle.close()
    assert len(middle.from_client) == handshake._GREETING.size + 33
    assert len(middle.from_server) == handshake._GREETING.size + 34
    return middle


def against(end: str, sent: bytes, *, closes: bool = True) -> Outcome:
    """What becomes of an end to which somebody sends bytes."""

    async def talk() -> Outcome:
        here, there = tcp_pair()
        with here, there:
            here.sendall(sent)
            if closes:
                here.shutdown(socket.SHUT_WR)
            work = accept(there, OWN, lambda link: 0) if end == "FFN" else connect(there, OWN, LINK)
            outcome, *_ = await asyncio.gather(work, return_exceptions=True)
            return outcome

    return asyncio.run(asyncio.wait_for(talk(), 30))


def test_a_replayed_handshake_is_refused() -> None:
    middle = recorded()
    found = against("FFN", middle.from_client)
    assert isinstance(found, HandshakeError) and "their keys differ" in str(found)
    found = against("attention", middle.from_server)
    assert isinstance(found, HandshakeError) and "their keys differ" in str(found)


def test_an_end_that_hears_itself_is_refused() -> None:
    """The two sides' proofs differ, so that none can be sent back."""
    middle = recorded()
    greeting = middle.from_server[: handshake._GREETING.size]
    proof = middle.from_server[handshake._GREETING.size : -1]
    found = against("FFN", greeting + proof)
    assert isinstance(found, HandshakeError)


@pytest.mark.parametrize("end", ["FFN", "attention"])
def test_no_bytes_but_the_right_ones_pass(end: str) -> None:
    generator = random.Random(3)
    middle = recorded()
    good = middle.from_client if end == "FFN" else middle.from_server
    for case in range(120):
        match case % 3:
            case 0:
                sent = generator.randbytes(generator.randint(0, 200))
            case 1:
                sent = good[: generator.randint(0, len(good) - 1)]
            case _:
                at = generator.randrange(len(good))
                sent = good[:at] + bytes([good[at] ^ 1 << generator.randrange(8)]) + good[at + 1 :]
        assert isinstance(against(end, sent), HandshakeError | OSError)


def test_bytes_behind_the_handshake_are_left_to_the_link() -> None:
    async def both() -> bytes:
        here, there = tcp_pair()
        with here, there:
            await asyncio.gather(connect(here, OWN, LINK), accept(there, OWN, lambda link: 0))
            here.sendall(b"the link's")
            return await asyncio.get_running_loop().sock_recv(there, 100)

    assert asyncio.run(asyncio.wait_for(both(), 30)) == b"the link's"
