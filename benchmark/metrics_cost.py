"""What metrics cost: the share of time that the scheduler takes to record them, and the share that
answers to Prometheus take.

    python -m benchmark.metrics_cost [--seconds 20] [--streams 16] [--quick]

Metrics cannot be switched off, so their parts are timed. A server of the bundled models answers as
many requests as it can; they are tiny, so that tokens are as frequent as they can be. What it
records of these tokens, requests and steps is recorded again here, by the same functions, and
timed: the median of seven runs, loop included. Then the server, idle, is asked for ``/metrics``
again and again, and the CPU time of its processes is compared with a time without questions. The
record is ``benchmark/results/metrics_cost.jsonl``; the status is 1 where both together take 1 % of
one core or more, with Prometheus asking every 15 s, its example's interval.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

from crosspool.scheduler.counters import ModelCounters
from crosspool.scheduler.rates import ModelRates
from crosspool.scheduler.request import Finish
from crosspool.scheduler.request_times import RequestTimes

from benchmark import machine
from benchmark.records import Recorder
from benchmark.server import TINY_MODELS, Server, one_device

LIMIT = 0.01
SCRAPE_SECONDS = 15.0
_OUTPUT = 128
_PROMPT = "The import statement combines two operations. " * 4
_RUNS = 7
_SCRAPES = 40


@dataclass(frozen=True)
class Traffic:
    """What a server did within some seconds."""

    seconds: float
    requests: int
    tokens: int
    steps: int

    @property
    def batch(self) -> int:
        """Rows of a step, rounded up."""
        return -(-self.tokens // max(self.steps, 1))


def load(server: Server, seconds: float, streams: int) -> Traffic:
    """Keep as many requests open for the time, of all models in turn."""

    def counts() -> dict[str, int]:
        models = server.status()["models"]
        names = {"requests": "admitted", "tokens": "output_tokens", "steps": "steps"}
        return {name: sum(m[field] for m in models) for name, field in names.items()}

    def ask_on(stream: int) -> None:
        model = TINY_MODELS[stream % len(TINY_MODELS)]
        body = {"model": model, "prompt": _PROMPT, "max_tokens": _OUTPUT, "ignore_eos": True}
        while time.monotonic() < end:
            status, answer = server.request("POST", "/v1/completions", body)
            if status != 200:
                raise RuntimeError(f"HTTP {status}: {answer}")

    before, start = counts(), time.monotonic()
    end = start + seconds
    with ThreadPoolExecutor(streams) as threads:
        list(threads.map(ask_on, range(streams)))
    took, after = time.monotonic() - start, counts()
    return Traffic(took, **{name: after[name] - before[name] for name in after})


def record(traffic: Traffic) -> float:
    """Return the seconds that it takes to record the traffic, of one model."""
    counters, rates, times = ModelCounters(), ModelRates(), RequestTimes()
    seq: Any = SimpleNamespace(
        replayed=False, is_timed=True, timeline=None, arrived=0.0, sampled_at=None, cached=0
    )
    seq.prompt_len = seq.prefill_len = 32
    seq.tokens = [0] * (32 + _OUTPUT)
    row = SimpleNamespace(start=64, tokens=[0])
    flight: Any = SimpleNamespace(sequences=[seq] * traffic.batch, rows=[row] * traffic.batch)
    finish = Finish(kind="length")
    start = time.perf_counter()
    for number in range(traffic.requests):
        now = float(number)
        seq.sampled_at = None
        counters.admit(seq)
        times.admitted(seq, now)
        rates.admitted(32, 0, now)
        counters.end(finish)
        times.ended(seq, finish, now)
    for number in range(traffic.tokens):
        now = number * 1e-3
        rates.generated(now)
        times.sampled(seq, now)
    for _ in range(traffic.steps):
        counters.step(flight)
    return time.perf_counter() - start


def scrape(server: Server, count: int) -> float:
    """Return the CPU seconds of the server's processes for one answer to Prometheus."""

    def used(questions: int) -> tuple[float, float]:
        before, start = sum(server.cpu_seconds().values()), time.monotonic()
        for _ in range(questions):
            status, _ = server.request("GET", "/metrics")
            if status != 200:
                raise RuntimeError(f"/metrics: HTTP {status}")
        if not questions:
            time.sleep(5)
        return sum(server.cpu_seconds().values()) - before, time.monotonic() - start

    idle, idle_took = used(0)
    asked, took = used(count)
    return (asked - idle * took / idle_took) / count


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.metrics_cost", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="two seconds; writes no record")
    given = parser.parse_args(words)
    seconds = 2.0 if given.quick else given.seconds
    load1, busy, start = machine.load1(), machine.busy_seconds(), time.monotonic()
    with Server([*one_device(), "--kv-pool-bytes", "128MiB"]) as server:
        traffic = load(server, seconds, given.streams)
        server.wait_idle()
        per_scrape = scrape(server, 5 if given.quick else _SCRAPES)
    recording = [record(traffic) for _ in range(_RUNS)]
    both: dict[str, Any] = {
        "parameters": {"seconds": seconds, "streams": given.streams, "batch": traffic.batch},
        "load1": load1,
        "cpu_s": machine.busy_seconds() - busy,
        "wall_s": time.monotonic() - start,
    }
    recorder = Recorder("metrics_cost")
    shares = {
        "recording": median(recording) / traffic.seconds,
        "scraping": per_scrape / SCRAPE_SECONDS,
    }
    recorder.add("tokens_per_s", [traffic.tokens / traffic.seconds], "1/s", **both)
    recorder.add(
        "recording_of_a_token", [1e6 * one / traffic.tokens for one in recording], "us", **both
    )
    recorder.add("scrape", [1e3 * per_scrape], "ms", **both)
    for name, share in shares.items():
        recorder.add(f"{name}_share", [share], "of one core", limit=LIMIT, **both)
        print(f"{name}: {100 * share:.3f} % of one core")
    tokens = traffic.tokens / traffic.seconds
    print(f"at {tokens:.0f} tokens/s in batches of {traffic.batch}; limit {100 * LIMIT:g} %")
    if not given.quick:
        print(recorder.write())
    return 0 if sum(shares.values()) < LIMIT or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
