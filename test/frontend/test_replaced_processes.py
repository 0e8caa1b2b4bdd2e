"""A front end whose processes die, and others take their places."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.front_end import MODELS, FrontEndServer, deployment

LONG: dict[str, Any] = {"model": MODELS[0], "prompt": "x", "max_tokens": 3000, "rid": "one"}


@pytest.fixture(scope="module")
def server(script: Callable[[int, list[int], int], int]) -> Iterator[FrontEndServer]:
    running = FrontEndServer(deployment(sglang={"enable_metrics": True}), script)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def running_requests(server: FrontEndServer) -> int:
    status, answer, _ = server.request("/crosspool/status")
    assert status == 200, answer
    return sum(model["running"] + model["waiting"] for model in answer["models"])


def wait_running(server: FrontEndServer, count: int) -> None:
    deadline = time.monotonic() + 20
    while running_requests(server) != count:
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.02)


def test_a_replaced_http_process_serves_those_who_wait_and_forgets_the_others(
    server: FrontEndServer, slow: None
) -> None:
    """No connection is refused, also while there is no HTTP process. What the dead one was asked is
    aborted, and its ids are free."""
    body = {**LONG, "max_tokens": 8}
    expected = server.request("/v1/completions", {**body, "rid": "other"})[1]["choices"]
    with ThreadPoolExecutor(4) as threads:
        lost = [
            threads.submit(server.request, "/v1/completions", {**LONG, "rid": rid})
            for rid in ("one", "two")
        ]
        wait_running(server, 2)
        served = server.request("/metrics")[1]
        killed = time.monotonic()
        threading.Timer(0.05, server.replace, ["http"]).start()
        assert [answer.result(10)[0] for answer in lost] == [0, 0]
        status, answer, _ = server.request("/v1/completions", body)
    assert status == 200, (answer, server.log.read_text())
    assert answer["choices"] == expected
    assert time.monotonic() - killed < 20
    wait_running(server, 0)
    assert server.manage("/flush_cache") == 200
    name = "sglang:generation_tokens_total"
    assert metric(server.request("/metrics")[1], name) > metric(served, name)
    log = server.log.read_text()
    assert "the state was deleted" not in log and "Traceback" not in log, log
    assert "threads, which forked processes lack" not in log, log
    print("seconds", time.monotonic() - killed)


def metric(text: str, name: str) -> float:
    values = [line.split()[-1] for line in text.splitlines() if line.startswith(name + "{")]
    return sum(map(float, values))
