"""One request that asks for too much stops nobody else: streams go on and /health answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from support.server import TINY_MODELS, Server

MODEL = TINY_MODELS[0]
GENERATE = f"/m/{MODEL}/generate"
STREAMS = 3
LONGEST_SILENCE = 5.0
"""Seconds. Each of these requests silenced the server for longer, most for more than a minute; on
an idle machine, the longest silence is now below half a second."""
MOST_MEMORY = 200 << 20


def numbers(count: int) -> bytes:
    return b"[" + b"1," * (count - 1) + b"1]"


REQUESTS: dict[str, tuple[str, bytes | dict[str, Any]]] = {
    "prompt of 60 MB": (GENERATE, b'{"text": "' + b"word " * (12 << 20) + b'"}'),
    "prompt of 7 MB": ("/v1/completions", {"model": MODEL, "prompt": "word " * 1_400_000}),
    "prompt of 350 kB": (GENERATE, {"text": "word " * 70_000}),
    "chat of 7 MB": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "word " * 70_000}] * 20},
    ),
    "stop string of 20 MB": (
        GENERATE,
        {"text": "a", "sampling_params": {"stop": "x" * (20 << 20)}},
    ),
    "stop string of 7 MB": (GENERATE, {"text": "a", "sampling_params": {"stop": "x" * (7 << 20)}}),
    "body of 100 MB": (GENERATE, b"x" * (100 << 20)),
    "20 million token ids": (GENERATE, b'{"input_ids": ' + numbers(20_000_000) + b"}"),
    "3 million token ids": (GENERATE, b'{"input_ids": ' + numbers(3_000_000) + b"}"),
    "a million biases": (
        GENERATE,
        {"text": "a", "sampling_params": {"logit_bias": {str(i): 1 for i in range(1_000_000)}}},
    ),
    "a million samples": (GENERATE, {"text": "a", "sampling_params": {"n": 1_000_000}}),
    "8 million log-probabilities": (
        GENERATE,
        {
            **{"input_ids": [5] * 4000, "return_logprob": True, "logprob_start_len": 0},
            **{"top_logprobs_num": 2048, "sampling_params": {"max_new_tokens": 1}},
        },
    ),
    "a million lists within each other": (GENERATE, b'{"text": ' + b"[" * 1_000_000),
    "60,000 wrong parts": (
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "x"}] * 60}] * 1000},
    ),
}


class Others:
    """Clients that stream from every model and ask for /health, and the longest silence of each."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ending = threading.Event()
        self._heard = dict.fromkeys(range(STREAMS + 1), time.monotonic())
        self._silences: dict[int, float] = {}
        self.threads = [
            threading.Thread(target=self._stream, args=(index,), daemon=True)
            for index in range(STREAMS)
        ] + [threading.Thread(target=self._health, daemon=True)]

    def _hear(self, index: int) -> None:
        now = time.monotonic()
        silence = now - self._heard[index]
        self._silences[index] = max(self._silences.get(index, 0.0), silence)
        self._heard[index] = now

    def _stream(self, index: int) -> None:
        params = {"max_new_tokens": 500, "ignore_eos": True, "temperature": 0}
        body = json.dumps({"text": "import", "stream": True, "sampling_params": params})
        path = f"/m/{TINY_MODELS[index % len(TINY_MODELS)]}/generate"
        while not self._ending.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=120)
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            while answer.readline() and not self._ending.is_set():
                self._hear(index)
            connection.close()

    def _health(self) -> None:
        while not self._ending.is_set():
            assert self._server.status("/health") == 200
            self._hear(STREAMS)
            time.sleep(0.01)

    def forget(self) -> None:
        self._silences.clear()

    def longest_silence(self) -> float:
        for index in self._heard:
            self._hear(index)
        return max(self._silences.values())

    def __enter__(self) -> Others:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self.threads:
            thread.join(120)


def send(server: Server, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture(scope="module")
def others(server: Server) -> Iterator[Others]:
    with Others(server) as clients:
        time.sleep(1)
        yield clients


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_asks_for_too_much_stops_nobody(
    server: Server, others: Others, name: str
) -> None:
    path, content = REQUESTS[name]
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    process = server.find("http")
    before = process.memory_info().rss
    peak = [before]
    done = threading.Event()

    def watch(process: psutil.Process) -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.01)

    watching = threading.Thread(target=watch, args=(process,))
    watching.start()
    others.forget()
    status, answer = send(server, path, body)
    time.sleep(0.5)
    done.set()
    watching.join()
    assert status in (400, 413), answer
    assert json.loads(answer)["error"]["message"]
    assert others.longest_silence() < LONGEST_SILENCE
    assert peak[0] - before < MOST_MEMORY


def test_connections_without_a_header_hold_up_nobody(server: Server, others: Others) -> None:
    others.forget()
    with contextlib.ExitStack() as stack:
        for index in range(400):
            address = ("127.0.0.1", server.port)
            connection = stack.enter_context(socket.create_connection(address, 30))
            connection.sendall(b"GET /health HTTP/1.1\r\n"[: index % 20])
        last = connection
        with contextlib.suppress(ConnectionResetError):
            while last.recv(65536):  # until it is closed
                pass
    assert others.longest_silence() < LONGEST_SILENCE
