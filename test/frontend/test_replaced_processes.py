"""A front end whose processes die, and others take their places."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
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


@contextmanager
def at_full_speed(server: FrontEndServer) -> Iterator[None]:
    """Devices take no time. What they answer does not depend on it."""
    seconds = server.devices[0].step_seconds
    for device in server.devices:
        device.step_seconds = 0.0
    yield
    for device in server.devices:
        device.step_seconds = seconds


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


STREAMS: list[dict[str, Any]] = [
    {"model": MODELS[0], "prompt": "x", "max_tokens": 90},
    {"model": MODELS[1], "prompt": "x", "max_tokens": 90},
    {"model": MODELS[0], "prompt": "x y", "max_tokens": 90, "logprobs": 2, "echo": True},
    {"model": MODELS[0], "prompt": "x", "max_tokens": 90, "n": 2, "seed": 5},
    {"model": MODELS[1], "prompt": "x", "max_tokens": 90, "stop": ["lazy dog and"]},
]


def told(events: list[Any]) -> dict[int, Any]:
    """All that a stream tells of each of its choices."""
    choices: dict[int, Any] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        of = choices.setdefault(choice["index"], {"text": "", "tokens": [], "logprobs": []})
        of["text"] += choice["text"]
        of["finish"] = choice["finish_reason"]
        if choice["logprobs"] is not None:
            of["tokens"] += choice["logprobs"]["tokens"]
            of["logprobs"] += choice["logprobs"]["token_logprobs"]
    return choices


def test_a_replaced_detokenizer_goes_on_where_the_dead_one_was(
    server: FrontEndServer, slow: None
) -> None:
    """Whatever had not arrived is sent again, and nothing comes twice."""
    whole = {"model": MODELS[0], "prompt": "x", "max_tokens": 90, "logprobs": 1}

    def ask() -> tuple[list[Any], Any]:
        with ThreadPoolExecutor(len(STREAMS) + 1) as threads:
            streams = [threads.submit(server.events, "/v1/completions", body) for body in STREAMS]
            answer = threads.submit(server.request, "/v1/completions", whole)
            return [told(stream.result()) for stream in streams], answer.result()[1]["choices"]

    with at_full_speed(server):
        expected = ask()
    replaced = 0
    with ThreadPoolExecutor(1) as threads:
        answers = threads.submit(ask)
        wait_running(server, len(STREAMS) + 2)
        while not answers.done() and replaced < 4:
            server.replace("detokenizer")
            replaced += 1
            time.sleep(0.7)
        assert answers.result() == expected
    assert replaced > 1
    sockets = Path(server.deployment.runtime_dir).glob("m*.detok*")
    assert len(list(sockets)) == len(MODELS), "those of dead detokenizers are removed"
    log = server.log.read_text()
    assert "the state was deleted" not in log and "Traceback" not in log, log


def ask_all(server: FrontEndServer) -> Callable[[], list[Any]]:
    """Begins requests of every kind, and returns what waits for their answers."""
    whole: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"model": MODELS[0], "prompt": "x", "max_tokens": 90, "logprobs": 1}),
        ("/v1/completions", {"model": MODELS[1], "prompt": "x", "max_tokens": 60, "n": 2}),
    ]
    grammar = {"regex": "[a-z ]{80,120}", "temperature": 0}
    streams = [
        *STREAMS,
        {"model": MODELS[0], "prompt": "x", "max_tokens": 120, **grammar},
        {"model": MODELS[0], "prompt": "x", "max_tokens": 90, "stop": [" dog and then it walks"]},
    ]
    threads = ThreadPoolExecutor(len(streams) + len(whole))
    told_of = [threads.submit(server.events, "/v1/completions", body) for body in streams]
    answers = [threads.submit(server.request, *ask) for ask in whole]

    def wait() -> list[Any]:
        with threads:
            found = [told(stream.result(60)) for stream in told_of]
            return [*found, *(answer.result(60)[1]["choices"] for answer in answers)]

    return wait


def assert_quiet(server: FrontEndServer) -> None:
    log = server.log.read_text()
    assert "the state was deleted" not in log and "Traceback" not in log, log
    wait_running(server, 0)
    ranks = server.request("/crosspool/status")[1]["ranks"]
    assert not any(rank["promised_bytes"] for rank in ranks)


@pytest.mark.parametrize("pause", [0.5, 0.05], ids=["apart", "twice in a row"])
def test_another_scheduler_goes_on_with_every_request(
    server: FrontEndServer, slow: None, pause: float
) -> None:
    """Tokens, text, log-probabilities, stop strings and ends are those of a server whose scheduler
    lives; ``/health`` never fails."""
    with at_full_speed(server):
        expected = ask_all(server)()
    before = server.request("/crosspool/status")[1]["incarnation"]
    wait = ask_all(server)
    wait_running(server, len(STREAMS) + 6)
    for _ in range(2):
        time.sleep(pause)
        server.replace("scheduler")
        assert server.request("/health")[0] == 200
    deadline = time.monotonic() + 20
    while server.request("/crosspool/status")[1].get("incarnation") != before + 2:
        assert time.monotonic() < deadline, server.log.read_text()
    assert wait() == expected
    assert server.request("/health")[0] == 200
    assert_quiet(server)


def test_requests_that_come_while_there_is_no_scheduler_are_served(server: FrontEndServer) -> None:
    body = {"model": MODELS[0], "prompt": "x", "max_tokens": 5}
    expected = server.request("/v1/completions", body)[1]["choices"]
    server.processes["scheduler"].suspend()
    with ThreadPoolExecutor(3) as threads:
        before = threads.submit(server.request, "/v1/completions", body)
        loads = threads.submit(server.request, f"/m/{MODELS[0]}/v1/loads")
        time.sleep(0.3)
        server.processes["scheduler"].kill()
        server.processes["scheduler"].wait(10)
        after = threads.submit(server.request, "/v1/completions", body)
        server.replace("scheduler", start_devices=False)
        deadline = time.monotonic() + 20
        while (health := server.request("/health?strict=1"))[0] != 503:
            assert time.monotonic() < deadline, server.log.read_text()
        assert health[1]["message"] == "the scheduler is a new one: loading on cpu"
        assert server.request("/health")[0] == 200
        assert not before.done() and not after.done()
        server.devices[0].start()
        assert [answer.result(20)[1]["choices"] for answer in (before, after)] == [expected] * 2
        assert loads.result(20)[0] == 200, loads.result()
    assert_quiet(server)


def test_what_was_aborted_and_paused_stays_so_under_another_scheduler(
    server: FrontEndServer, slow: None
) -> None:
    with ThreadPoolExecutor(3) as threads:
        paused = threads.submit(
            server.request, "/v1/completions", {**LONG, "rid": "paused", "max_tokens": 30}
        )
        aborted = threads.submit(server.request, "/v1/completions", {**LONG, "rid": "aborted"})
        wait_running(server, 2)
        assert server.manage(f"/m/{MODELS[0]}/pause_generation", {"mode": "in_place"}) == 200
        server.processes["scheduler"].suspend()
        assert server.request("/abort_request", {"rid": "aborted"})[0] == 200
        time.sleep(0.2)
        server.replace("scheduler")
        assert aborted.result(20)[0] != 0
        wait_running(server, 1)
        time.sleep(1)
        assert not paused.done(), "the model is still paused"
        assert server.manage(f"/m/{MODELS[0]}/continue_generation", {}) == 200
        status, answer, _ = paused.result(20)
        assert status == 200 and answer["usage"]["completion_tokens"] == 30
    assert_quiet(server)


def test_scheduler_and_http_process_are_replaced_together(
    server: FrontEndServer, slow: None
) -> None:
    body = {**LONG, "max_tokens": 8}
    expected = server.request("/v1/completions", {**body, "rid": "other"})[1]["choices"]
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(server.request, "/v1/completions", LONG)
        wait_running(server, 1)
        server.processes["http"].kill()
        server.replace("scheduler")
        server.replace("http")
        assert lost.result(20)[0] == 0
    status, answer, _ = server.request("/v1/completions", body)
    assert status == 200 and answer["choices"] == expected, (answer, server.log.read_text())
    server.replace("scheduler")
    status, answer, _ = server.request("/v1/completions", body)
    assert status == 200 and answer["choices"] == expected, (answer, server.log.read_text())
    assert_quiet(server)


def test_what_the_detokenizer_had_at_its_end_is_not_lost(server: FrontEndServer) -> None:
    """It has the outputs of requests, ends included, and has passed none of them on."""
    body = {"model": MODELS[0], "prompt": "x", "max_tokens": 20}
    expected = server.request("/v1/completions", body)[1]["choices"]
    server.processes["detokenizer"].suspend()
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(server.request, "/v1/completions", body) for _ in range(4)]
        wait_running(server, 0)
        time.sleep(0.5)
        assert not any(answer.done() for answer in answers)
        server.replace("detokenizer")
        assert [answer.result()[1]["choices"] for answer in answers] == [expected] * 4


def metric(text: str, name: str) -> float:
    values = [line.split()[-1] for line in text.splitlines() if line.startswith(name + "{")]
    return sum(map(float, values))
