"""Hostile clients that need more than one exchange: slow, silent, impatient, or many at once."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmark.front_door.exchange import LOOPBACK, Outcome, head, post, send, status_of
from benchmark.front_door.hostile_bodies import (
    AMBIGUOUS,
    SHORT,
    Place,
    Row,
    left_recursive,
    nested_schema,
)

CLOSED_WITHIN = 75.0
"""Seconds within which a server should close a connection that never sends a whole request."""


def _connect(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), timeout=5)


def _closed(connection: socket.socket) -> bool:
    """Whether the server has closed the connection, maybe after an answer."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _wait_closed(connections: list[socket.socket], began: float) -> Outcome:
    left = connections
    while left and time.monotonic() - began < CLOSED_WITHIN:
        time.sleep(0.5)
        left = [connection for connection in left if not _closed(connection)]
    for connection in connections:
        connection.close()
    seconds = time.monotonic() - began
    note = f"{len(connections) - len(left)} of {len(connections)} connections closed by the server"
    return Outcome(0, seconds, note, not left)


def _unfinished(count: int, start: bytes) -> Any:
    """``count`` connections that send ``start`` and then nothing."""

    def sent(place: Place) -> Outcome:
        began = time.monotonic()
        connections = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                connections.append(_connect(place.port))
                connections[-1].sendall(start)
        if not connections:
            return Outcome(0, time.monotonic() - began, "no connection was taken", False)
        return _wait_closed(connections, began)

    return sent


def _dripping(start: bytes, piece: bytes) -> Any:
    """50 connections that send ``start`` and then ``piece`` every half second."""

    def sent(place: Place) -> Outcome:
        began = time.monotonic()
        connections = [_connect(place.port) for _ in range(50)]
        left = connections
        for connection in connections:
            connection.sendall(start)
        while left and time.monotonic() - began < CLOSED_WITHIN:
            time.sleep(0.5)
            left = [connection for connection in left if not _closed(connection)]
            for connection in left:
                connection.setblocking(True)
                with contextlib.suppress(OSError):
                    connection.sendall(piece)
        for connection in connections:
            connection.close()
        note = f"{50 - len(left)} of 50 connections closed by the server"
        return Outcome(0, time.monotonic() - began, note, not left)

    return sent


def _unread(place: Place) -> Outcome:
    """50 streams that nobody reads, for ten seconds."""
    began = time.monotonic()
    sampling = {"max_new_tokens": 3000, "ignore_eos": True}
    body = {"text": [SHORT] * 4, "sampling_params": sampling, "stream": True}
    data = json.dumps({**body, "return_logprob": True, "top_logprobs_num": 20}).encode()
    connections = []
    for _ in range(50):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect((LOOPBACK, place.port))
        connection.sendall(head(place.native(), len(data)) + data)
        connections.append(connection)
    time.sleep(10)
    for connection in connections:
        connection.close()
    return Outcome(0, time.monotonic() - began, "50 streams were not read", True)


def _half_closed(place: Place) -> Outcome:
    """20 clients that close their sending side with the request and then read."""
    began = time.monotonic()
    body = json.dumps({"model": place.model, "prompt": SHORT, "max_tokens": 8}).encode()
    statuses = []
    for _ in range(20):
        with _connect(place.port) as connection:
            connection.settimeout(20)
            connection.sendall(head("/v1/completions", len(body)) + body)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                statuses.append(status_of(connection.recv(1 << 16)))
    # A server may take a half-closed connection for a client that has gone: no answer is needed.
    return Outcome(0, time.monotonic() - began, f"statuses {sorted(set(statuses))}", True)


def _pipelined(place: Place) -> Outcome:
    """1,000 requests on one connection before the first answer is read."""
    began = time.monotonic()
    body = json.dumps({"model": place.model, "prompt": SHORT, "max_tokens": 1}).encode()
    request = head("/v1/completions", len(body)) + body
    answers = 0
    with _connect(place.port) as connection, ThreadPoolExecutor(1) as threads:
        connection.settimeout(20)
        sending = threads.submit(connection.sendall, request * 1000)
        with contextlib.suppress(OSError):
            while answers < 1000 and (part := connection.recv(1 << 20)):
                answers += part.count(b"HTTP/1.1 ")
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            sending.result()
    return Outcome(0, time.monotonic() - began, f"{answers} answers", answers > 0)


def _aborts(place: Place) -> Outcome:
    """5,000 aborts of requests that do not exist, over 50 connections at once."""
    began = time.monotonic()

    def hundred(index: int) -> set[int]:
        answers = (
            post(place.port, "/abort_request", {"rid": f"none-{index}-{i}"}) for i in range(100)
        )
        return {answer.status for answer in answers}

    with ThreadPoolExecutor(50) as threads:
        seen = set().union(*threads.map(hundred, range(50)))
    good = all(status in (200, 429, 503) for status in seen)
    return Outcome(0, time.monotonic() - began, f"statuses {sorted(seen)}", good)


def _disconnects(place: Place) -> Outcome:
    """500 clients that each leave 10 ms after a request of 20 samples."""
    began = time.monotonic()
    sampling = {"max_new_tokens": 1000, "n": 20}
    body = json.dumps({"text": SHORT, "sampling_params": sampling}).encode()
    for _ in range(500):
        with contextlib.suppress(OSError), _connect(place.port) as connection:
            connection.sendall(head(place.native(), len(body)) + body)
            time.sleep(0.01)
    return Outcome(0, time.monotonic() - began, "500 clients left", True)


def _crowd_of_samples(place: Place) -> Outcome:
    """100 requests of 256 samples each at once."""
    began = time.monotonic()
    body = {"model": place.model, "prompt": SHORT, "max_tokens": 8, "n": 256}
    with ThreadPoolExecutor(100) as threads:
        sent = [threads.submit(post, place.port, "/v1/completions", body) for _ in range(100)]
        seen = {answer.result().status for answer in sent}
    good = seen <= {200, 429, 503}
    return Outcome(0, time.monotonic() - began, f"statuses {sorted(seen)}", good)


def _flood(place: Place) -> Outcome:
    """2,000 short requests over 200 connections at once."""
    began = time.monotonic()
    body = {"model": place.model, "prompt": SHORT, "max_tokens": 1}

    def ten(_: int) -> set[int]:
        return {post(place.port, "/v1/completions", body, timeout=60).status for _ in range(10)}

    with ThreadPoolExecutor(200) as threads:
        seen = set().union(*threads.map(ten, range(200)))
    good = seen <= {200, 429, 503}
    return Outcome(0, time.monotonic() - began, f"statuses {sorted(seen)}", good)


def _regex_behind_grammars(place: Place) -> Outcome:
    """An innocent regex of another model while eight bad grammars compile. Its own time counts."""
    bad: list[dict[str, Any]] = [
        {"ebnf": AMBIGUOUS + f' | "{i}"' if i % 2 else left_recursive(200 + i)} for i in range(4)
    ]
    bad += [{"json_schema": nested_schema(300 + i)} for i in range(4)]
    long = {"max_new_tokens": 300, "min_new_tokens": 250}
    with ThreadPoolExecutor(8) as threads:
        for sampling in bad:
            body = {"text": SHORT, "sampling_params": {**long, **sampling}}
            threads.submit(post, place.port, place.native(), body, timeout=20)
        time.sleep(0.3)
        innocent = {"text": SHORT, "sampling_params": {"max_new_tokens": 20, "regex": "[a-y]{3,9}"}}
        answer = post(place.port, f"/m/{place.models[1]}/generate", innocent, timeout=30)
        good = answer.status == 200 and answer.seconds < 5
        return Outcome(answer.status, answer.seconds, answer.note, good)


def _distinct_regexes(place: Place) -> Outcome:
    """500 regexes, all different, from 8 clients at once."""
    began = time.monotonic()

    def one(index: int) -> int:
        sampling = {"max_new_tokens": 4, "regex": f"[a-f]{{2,{index + 3}}}x{index}"}
        return post(place.port, place.native(), {"text": SHORT, "sampling_params": sampling}).status

    with ThreadPoolExecutor(8) as threads:
        seen = set(threads.map(one, range(500)))
    return Outcome(0, time.monotonic() - began, f"statuses {sorted(seen)}", seen <= {200, 429})


def _endless_chunks(place: Place) -> Outcome:
    """A chunked body that never ends, as fast as the server takes it, up to 100 MB."""
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    return send(place.port, head("/v1/completions", None), chunk * 100, 30)


def _lying_length(place: Place) -> Outcome:
    """The head of a body of 10 TB, of which little comes."""
    return send(place.port, head("/v1/completions", 10**13), b'{"model":', 30)


def _continue(place: Place) -> Outcome:
    """``Expect: 100-continue`` with a length that no server should take."""
    start = head(place.native(), 500_000_000, {"Expect": "100-continue"})
    return send(place.port, start, b"", 30)


def known_clients() -> Iterator[Row]:
    """Yield the clients that once stopped a server or took its descriptors."""
    start = f"POST /v1/completions HTTP/1.1\r\nHost: {LOOPBACK}\r\nX: ".encode()
    yield Row("2,000 connections without a whole header", True, _unfinished(2000, start))
    yield Row("a regex of another model behind bad grammars", True, _regex_behind_grammars)


def own_clients() -> Iterator[Row]:
    """Yield further clients."""
    body = head("/v1/completions", 1000)
    yield Row("500 distinct regexes", False, _distinct_regexes)
    yield Row("500 connections without a byte", False, _unfinished(500, b""))
    yield Row("500 connections without a whole body", False, _unfinished(500, body + b"{"))
    yield Row("headers a byte at a time", False, _dripping(b"GET /health HTTP/1.1\r\nX: ", b"a"))
    yield Row("bodies a byte at a time", False, _dripping(body, b" "))
    yield Row("a chunked body that never ends", False, _endless_chunks)
    yield Row("a body of 10 TB, by its header", False, _lying_length)
    yield Row("Expect: 100-continue of 500 MB", False, _continue)
    yield Row("50 streams that nobody reads", False, _unread)
    yield Row("20 clients half closed", False, _half_closed)
    yield Row("1,000 pipelined requests", False, _pipelined)
    yield Row("5,000 aborts", False, _aborts)
    yield Row("100 requests of 256 samples", False, _crowd_of_samples)
    yield Row("500 disconnects of 20 samples", False, _disconnects)
    yield Row("2,000 requests over 200 connections", False, _flood)
