"""Connections that never ask for anything whole are closed, and no more are held than allowed."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.server import connections
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse

HEADER_SECONDS, BODY_SECONDS, MOST = 0.5, 1.0, 20
HEADER = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
STREAM = b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n"


def deployment(**options: Any) -> Deployment:
    return Deployment(
        models={0: ModelConfig(name="first", path="/first")},
        next_model=1,
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=(Device("cpu"),),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        **options,
    )


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body and answers; ``/stream`` takes longer than any body may."""

    async def slowly() -> Any:
        for _ in range(8):
            yield b"."
            await asyncio.sleep(BODY_SECONDS / 4)

    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        return
    streams = scope["path"] == "/stream"
    response = StreamingResponse(slowly()) if streams else PlainTextResponse(f"got {len(body)}")
    await response(scope, receive, send)


class Running:
    def __init__(self) -> None:
        bounded = deployment(
            max_connections=MOST, header_timeout=HEADER_SECONDS, body_timeout=BODY_SECONDS
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            application,
            http=connections.protocol(bounded),
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=30,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def connect(running: Running) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 20))


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def answer(connection: socket.socket) -> bytes:
    """One answer whose body ends with its length in digits."""
    data = b""
    while not data.partition(b"\r\n\r\n")[2].startswith(b"got "):
        part = connection.recv(65536)
        assert part, data
        data += part
    return data


@pytest.mark.parametrize("sent", [b"", b"G", HEADER, GET + GET[:20]])
def test_a_header_that_never_becomes_whole_closes_the_connection(connect: Any, sent: bytes) -> None:
    began, connection = time.monotonic(), connect()
    connection.sendall(sent)
    got = read_all(connection)
    assert b"408" in got and b"whole header" in got
    assert time.monotonic() - began >= HEADER_SECONDS


def test_a_header_that_trickles_closes_the_connection(connect: Any) -> None:
    connection = connect()
    connection.settimeout(0.05)
    got = b""
    connection.sendall(HEADER)
    for _ in range(100):
        try:
            connection.sendall(b"X: y\r\n")
            got += connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            break
        if got:
            break
    assert b"408" in got


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_never_becomes_whole_closes_the_connection(connect: Any, chunked: bool) -> None:
    began, connection = time.monotonic(), connect()
    framing = b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    head = HEADER + b"\r\nhello" if not chunked else HEADER.rpartition(b"Content")[0] + framing
    connection.sendall(head)
    got = read_all(connection)
    assert b"408" in got and b"whole body" in got
    assert time.monotonic() - began >= BODY_SECONDS


def test_neither_an_idle_connection_nor_a_stream_is_closed(connect: Any) -> None:
    idle, streaming, pipelined = connect(), connect(), connect()
    idle.sendall(GET)
    answer(idle)
    streaming.sendall(STREAM)
    pipelined.sendall(STREAM + HEADER)
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        part = streaming.recv(65536)
        assert part, data
        data += part
    assert data.count(b".") >= 8
    idle.sendall(GET)
    assert b"got 0" in answer(idle)
    got = read_all(pipelined)
    assert got.count(b"1\r\n.\r\n") == 8 and b"408" in got.rpartition(b"0\r\n\r\n")[2]


def test_a_request_whose_parts_come_within_the_times_is_served(connect: Any) -> None:
    connection = connect()
    for part in (HEADER[:10], HEADER[10:] + b"\r\n", b"hello", b"world"):
        connection.sendall(part)
        time.sleep(HEADER_SECONDS / 3)
    assert b"got 10" in answer(connection)


def test_connections_beyond_the_bound_are_refused_and_others_go_on(connect: Any) -> None:
    first = connect()
    first.sendall(GET)
    answer(first)
    held = [connect() for _ in range(MOST - 1)]
    for one in held:
        one.sendall(GET)
        answer(one)
    refused = connect()
    got = read_all(refused)
    assert b"503" in got and b"max_connections" in got
    first.sendall(GET)
    answer(first)
    held.pop().close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        again = connect()
        try:
            again.sendall(GET)
            answer(again)
        except (OSError, AssertionError):
            continue
        return
    raise AssertionError("the place of a closed connection is not free")


def test_the_end_does_not_wait_for_a_body_that_trickles(running: Running, connect: Any) -> None:
    connection, began = connect(), time.monotonic()
    connection.sendall(HEADER + b"\r\nhello")
    idle = connect()
    time.sleep(0.2)
    running.stop()
    assert time.monotonic() - began < BODY_SECONDS
    assert read_all(connection) == b"" and read_all(idle) == b""


def test_descriptors_are_left_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [64, 64]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))

    def set_limits(_: int, new: tuple[int, int]) -> None:
        limits[:] = new

    monkeypatch.setattr(resource, "setrlimit", set_limits)
    assert connections.most_connections(deployment()) == 32
    limits[:] = 64, 1024
    assert connections.most_connections(deployment()) == 1024 - 256
    limits[:] = 64, 100_000
    assert connections.most_connections(deployment()) == 4096 and limits[0] == 4096 + 256
    limits[:] = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    assert connections.most_connections(deployment(max_connections=7)) == 7
