"""What happens when a process dies, is replaced or is not, and when the server is told to stop."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from crosspool.config.runtime_dir import find_running, metrics_folder
from support.marks import slow_but
from support.server import TINY_MODELS, Server, two_device_flags

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores for two devices"
)

SMALL = ["--kv-pool-bytes", "64MiB"]
"""Taking 4 GiB from the system, the default, may last ten seconds."""
WATCHDOG = 8
"""Seconds."""
LONG = {
    "text": "The import statement",
    "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True},
}


@needs_two_cores
@pytest.mark.parametrize("pool", slow_but(["kv"], ["kv", "weight"]))
def test_a_dead_rank_is_told_answered_503_and_ends_the_server(pool: str) -> None:
    """Where it may not be started again; test_restarts.py kills the others."""
    flags = [*two_device_flags(), *SMALL, "--failure-grace", "1", "--restart-limit", "0"]
    title = f"crosspool::device {flags[1 if pool == 'kv' else 3]}"
    with Server(flags, models=TINY_MODELS[:2]) as server:
        family, victim = server.processes(), server.find(title)
        with ThreadPoolExecutor(2) as threads:
            running = [
                threads.submit(server.post, f"/m/{model}/generate", LONG, 60)
                for model in TINY_MODELS[:2]
            ]
            while not all(m["running"] for m in server.get("/crosspool/status")["models"]):
                assert not any(answer.done() for answer in running), "they never ran together"
            victim.kill()
            killed = time.monotonic()
            seen: set[int | None] = set()
            while server.process.poll() is None and time.monotonic() - killed < 10:
                seen.add(server.status("/health"))
                time.sleep(0.05)
            for answer in running:
                assert answer.result()[0] == 503, answer.result()
        assert 503 in seen
        assert server.process.returncode == 1
        assert "SIGKILL" in server.log and title.rsplit(maxsplit=1)[-1] in server.log
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive


def test_sigterm_drains_running_requests() -> None:
    """Although their device dies meanwhile."""
    with Server([*SMALL, "--loop", "host"], models=TINY_MODELS[:1]) as server:
        body = {
            "text": "The import statement",
            "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True},
        }
        answers: list[int] = []
        thread = threading.Thread(
            target=lambda: answers.append(server.post("/generate", body)[0]), daemon=True
        )
        thread.start()
        while not server.get("/crosspool/status")["models"][0]["running"]:
            assert not answers, "it ended before it was seen"
        server.process.terminate()
        while "stopping once requests in flight are done" not in server.log:
            time.sleep(0.01)
        server.find("crosspool::device").kill()
        assert server.process.wait(60) == 0
        thread.join(10)
        assert answers == [200]
        assert "it is started again (restart 1)" in server.log


def test_killed_launcher_leaves_nothing_behind() -> None:
    with Server(SMALL, models=TINY_MODELS[:1]) as server:
        family = server.processes()
        assert len(family) >= 5
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(10)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive


def stream(server: Server, model: str, seen: list[str], begun: threading.Event) -> None:
    """Reads a long completion's stream into ``seen`` to its end, whatever that is."""
    body = {"model": model, "prompt": "x", "max_tokens": 3500, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    broken = contextlib.suppress(OSError, http.client.HTTPException)
    with broken, urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            seen.append(line.decode())
            begun.set()


@contextlib.contextmanager
def streaming(server: Server) -> Iterator[tuple[list[str], threading.Thread]]:
    """A stream that has begun, and the thread that reads it."""
    seen: list[str] = []
    begun = threading.Event()
    thread = threading.Thread(target=stream, args=(server, TINY_MODELS[0], seen, begun))
    thread.start()
    assert begun.wait(60)
    yield seen, thread
    thread.join(60)


def assert_ended_with_error(seen: list[str]) -> None:
    events = [line.removeprefix("data: ") for line in seen if line.startswith("data: ")]
    errors = [json.loads(event) for event in events if '"error"' in event]
    assert len(errors) == 1, events[-3:]
    assert errors[0]["error"]["code"] == 503, errors


def wait_for_health(server: Server, status: int, message: str) -> None:
    """Returns once ``/health`` has that status, with a message that contains ``message``."""
    deadline = time.monotonic() + 30
    while True:
        answer = httpx.get(f"{server.url}/health", timeout=30)
        if answer.status_code == status and message in answer.text:
            return
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["scheduler", "detokenizer"])
def test_a_process_that_is_not_replaced_is_told_of_at_once_and_ends_the_server(name: str) -> None:
    flags = [*SMALL, "--failure-grace", "4", "--restart-limit", "0"]
    with Server(flags, models=TINY_MODELS[:1]) as server:
        family, victim = server.processes(), server.find(f"crosspool::{name}")
        with streaming(server) as (seen, thread):
            victim.kill()
            # The launcher's word, not silence, from which nobody can tell the cause.
            wait_for_health(server, 503, f"{name} was killed by SIGKILL")
            thread.join(30)
            assert not thread.is_alive()
        assert_ended_with_error(seen)
        status, answer = server.post("/v1/completions", {"model": TINY_MODELS[0], "prompt": "x"})
        assert status == 503 and f"{name} was killed by SIGKILL" in answer["error"]["message"]
        assert server.process.wait(40) == 1
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive


def test_a_stopped_process_is_answered_503_until_it_continues_or_ends_the_server() -> None:
    flags = [*SMALL, "--failure-grace", "1", "--restart-limit", "0"]
    flags += ["--watchdog-timeout", str(WATCHDOG)]
    with Server(flags, models=TINY_MODELS[:1]) as server:
        for name in ("scheduler", "detokenizer"):
            victim = server.find(f"crosspool::{name}")
            with streaming(server) as (seen, thread):
                victim.suspend()
                wait_for_health(server, 503, f"{name} is stopped by a signal")
                thread.join(30)
                assert not thread.is_alive()
            assert_ended_with_error(seen)
            victim.resume()
            wait_for_health(server, 200, "ok")
            body = {"model": TINY_MODELS[0], "prompt": "x", "max_tokens": 5}
            status, answer = server.post("/v1/completions", body)
            assert status == 200, answer
        server.find("crosspool::scheduler").suspend()
        stopped = time.monotonic()
        assert server.process.wait(60) == 1
        assert time.monotonic() - stopped > WATCHDOG - 1
        assert "scheduler was stopped by a signal and did not continue in time" in server.log


GREEDY = {"prompt": "The import statement", "max_tokens": 300, "temperature": 0, "ignore_eos": True}


def text_of(server: Server, model: str) -> str:
    """The text of a greedy stream."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        data=json.dumps({**GREEDY, "model": model, "stream": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [line.decode().removeprefix("data: ").strip() for line in answer]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert lines[-2] == "[DONE]" and not any("error" in event for event in events), lines[-3:]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_front_end_processes_that_are_killed_are_replaced() -> None:
    """Streams go on as if nothing had happened when the detokenizer is killed; they break when the
    HTTP process is, and those who come after that are served. Nothing is left of its metrics."""
    with Server([*SMALL, "--enable-metrics"], models=TINY_MODELS[:2]) as server:
        family = {process.pid for process in server.processes()}
        expected = [text_of(server, model) for model in TINY_MODELS[:2]]
        with ThreadPoolExecutor(4) as threads:
            texts = [threads.submit(text_of, server, m) for m in TINY_MODELS[:2] * 2]
            kills = 0
            while not all(text.done() for text in texts) and kills < 4:
                found = [p for p in server.processes() if "detokenizer" in " ".join(p.cmdline())]
                for detokenizer in found:
                    detokenizer.kill()
                kills += len(found)
                time.sleep(1)
            assert [text.result() for text in texts] == expected * 2

        with streaming(server) as (_, thread):
            http_process = server.find("crosspool::http")
            metrics = metrics_folder(find_running(server.port))
            assert list(metrics.glob(f"*_{http_process.pid}.db"))
            http_process.kill()
            thread.join(10)
            assert not thread.is_alive()
        status, answer = server.post("/v1/completions", {**GREEDY, "model": TINY_MODELS[1]})
        assert status == 200 and answer["choices"][0]["text"] == expected[1]
        writers = {int(file.stem.rsplit("_", 1)[-1]) for file in metrics.iterdir()}
        assert server.find("crosspool::http").pid in writers
        assert writers <= {process.pid for process in server.processes()}
        assert server.manage("/flush_cache", {})[0] == 200
        models = server.get("/crosspool/status")["models"]
        assert not any(model["running"] or model["waiting"] for model in models)
        replaced = {process.pid for process in server.processes()} - family
        assert len(replaced) == 2
        assert server.stop() == 0


def test_a_server_whose_scheduler_cannot_go_on_ends_with_the_cause() -> None:
    """Where another one may not take its place."""
    flags = [*SMALL, "--failure-grace", "0.5", "--restart-limit", "0"]
    with Server(flags, models=TINY_MODELS[:1]) as server:
        family = server.processes()
        server.find("crosspool::grammars").kill()
        assert server.process.wait(30) == 1
        assert "the process that compiles grammars has ended" in server.log
        assert "scheduler exited with status 1" in server.log
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
