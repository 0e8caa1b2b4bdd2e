"""What happens when a process dies, and when the server is told to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from support.marks import slow_but
from support.server import TINY_MODELS, Server, two_device_flags

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores for two devices"
)

SMALL = ["--kv-pool-bytes", "64MiB"]
"""Taking 4 GiB from the system, the default, may last ten seconds."""
LONG = {
    "text": "The import statement",
    "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True},
}


@needs_two_cores
@pytest.mark.parametrize("pool", slow_but(["kv"], ["kv", "weight"]))
def test_a_dead_rank_is_told_answered_503_and_ends_the_server(pool: str) -> None:
    flags = [*two_device_flags(), *SMALL, "--failure-grace", "1"]
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
    with Server(SMALL, models=TINY_MODELS[:1]) as server:
        body = {
            "text": "The import statement",
            "sampling_params": {"max_new_tokens": 400, "ignore_eos": True},
        }
        answers: list[int] = []
        thread = threading.Thread(
            target=lambda: answers.append(server.post("/generate", body)[0]), daemon=True
        )
        thread.start()
        time.sleep(0.5)
        assert server.stop() == 0
        thread.join(10)
        assert answers == [200]


def test_killed_launcher_leaves_nothing_behind() -> None:
    with Server(SMALL, models=TINY_MODELS[:1]) as server:
        family = server.processes()
        assert len(family) >= 5
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(10)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
