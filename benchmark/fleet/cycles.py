"""What a server holds of models that have come and gone, and of those that are registered."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosspool.config.runtime_dir import find_running
from rich.progress import track

from benchmark import checkpoint
from benchmark.chaos.leftovers import Held
from benchmark.fleet.served import Fleet, timed
from benchmark.records import Recorder
from benchmark.server import DEMO
from benchmark.summary import quantile
from benchmark.usage import Usage, total

_WARM_UP = 20
"""Cycles after which what is made once has been made."""
_SETTLE_SECONDS = 3.0
_PAUSE_SECONDS = 0.1
"""Time between an answer of a model beside and its next request."""
MOST_REGISTERED = 20 << 20
"""Bytes that a model may take of all processes together while it sleeps."""


@dataclass(frozen=True)
class Holding:
    """What the whole server holds."""

    processes: dict[str, Held]
    """By title, without the processes that compile one grammar. Of memory that several share, each
    has its part."""
    shared: int
    """Files in /dev/shm."""
    files: int
    """Files in the runtime folder."""

    @property
    def memory(self) -> int:
        """Bytes of memory of all processes."""
        return sum(held.memory for held in self.processes.values())

    def difference(self, before: Holding) -> list[str]:
        """Return what has changed in number since ``before``, in words; memory is not looked at."""
        found = []
        for title, held in self.processes.items():
            earlier = before.processes[title]
            for what in ("descriptors", "threads"):
                now, then = getattr(held, what), getattr(earlier, what)
                if now != then:
                    found.append(f"{title}: {then} {what}, now {now}")
        for what in ("shared", "files"):
            now, then = getattr(self, what), getattr(before, what)
            if now != then:
                found.append(f"{what}: {then}, now {now}")
        return found


@dataclass
class Result:
    cycles: int
    before: Holding
    after: Holding
    halfway: Holding | None = None
    """What it held after half of the cycles."""
    registered: int = 0
    """Models that were loaded at the end, none of which was ever woken."""
    with_registered: Holding | None = None
    load_seconds: list[float] = field(default_factory=list)
    unload_seconds: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    beside: int = 0
    """Requests that the other models have answered meanwhile."""
    failed: list[str] = field(default_factory=list)
    """What went wrong with any request."""

    @property
    def bytes_per_cycle(self) -> float:
        return (self.after.memory - self.before.memory) / self.cycles

    @property
    def bytes_per_model(self) -> float:
        """Return the bytes that each registered model takes of all processes together."""
        if self.with_registered is None:
            return 0.0
        return (self.with_registered.memory - self.after.memory) / self.registered


def holding(server: Fleet) -> Holding:
    """Return what the server holds once its threads have ended."""
    time.sleep(_SETTLE_SECONDS)
    found = {}
    for title, process in server.processes().items():
        if "one grammar" in title:
            continue
        memory = process.memory_full_info()
        found[title] = Held(
            memory=memory.pss, descriptors=process.num_fds(), threads=process.num_threads()
        )
    folder = Path(find_running(server.port).runtime_dir)
    return Holding(
        processes=found,
        shared=len(os.listdir("/dev/shm")),
        files=sum(len(files) for _, _, files in os.walk(folder)),
    )


def _problem(server: Fleet, name: str) -> str | None:
    """Have a model generate some tokens; return what is wrong with the answer."""
    body = {"model": name, "prompt": "import", "max_tokens": 8, "temperature": 0}
    status, told = server.request("POST", "/v1/completions", body)
    return None if status == 200 else f"{name}: {status} {told}"


@contextmanager
def _answering(server: Fleet, names: Sequence[str], result: Result) -> Iterator[None]:
    """Ask the models ``names`` all the time within the ``with``."""
    over = threading.Event()
    lock = threading.Lock()

    def ask(name: str) -> None:
        while not over.wait(_PAUSE_SECONDS):
            try:
                problem = _problem(server, name)
            except OSError as error:
                problem = f"{name}: {error!r}"
            with lock:
                result.beside += 1
                result.failed += [] if problem is None else [problem]

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def run(*, cycles: int, registered: int) -> Result:
    """Load a tiny model, ask it, so that it wakes, and unload it, ``cycles`` times beside two
    others that are asked all the time; then load ``registered`` models that are never asked."""
    *served, coming = checkpoint.models(3, tiny=True)
    result = Result(cycles, Holding({}, 0, 0), Holding({}, 0, 0), registered=registered)

    def cycle(number: int) -> None:
        name = f"{coming.name}-{number % 10}"
        with timed(result.load_seconds):
            server.load(coming, name)
        problem = _problem(server, name)
        result.failed += [] if problem is None else [problem]
        with timed(result.unload_seconds):
            server.unload(name)

    with Fleet(served, 3, ["--kv-pool-bytes", "1GiB"]) as server:
        with _answering(server, server.names, result):
            for number in range(_WARM_UP):
                cycle(number)
        result.beside = 0
        result.load_seconds.clear()
        result.unload_seconds.clear()
        result.before = holding(server)
        for half in range(2):
            with Usage(server) as usage, _answering(server, server.names, result):
                for number in track(range(cycles // 2), f"cycles, half {half + 1}"):
                    cycle(number)
            result.halfway, result.after = result.after, holding(server)
            result.usages.append(usage)
        for number in track(range(registered), "registered models"):
            server.load(DEMO / "tiny-qwen3-moe", f"registered-{number}")
        if registered:
            result.with_registered = holding(server)
    return result


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("fleet_cycles")
    usage = total(result.usages)
    recorder.add("load", result.load_seconds, "s", model=model, parameters=parameters, **usage)
    recorder.add("unload", result.unload_seconds, "s", model=model, parameters=parameters, **usage)
    recorder.add(
        "memory per cycle", [result.bytes_per_cycle], "B", model=model, parameters=parameters,
        changes=result.after.difference(result.before), beside=result.beside,
        failed=len(result.failed), before=result.before.memory,
        halfway=result.halfway.memory if result.halfway else None, after=result.after.memory,
        **usage,
    )  # fmt: skip
    if result.with_registered is not None:
        recorder.add(
            "memory per registered model", [result.bytes_per_model], "B", model="tiny-qwen3-moe",
            parameters=parameters, limit=MOST_REGISTERED, **usage,
        )  # fmt: skip
    return recorder


def told(result: Result) -> str:
    changes = "; ".join(result.after.difference(result.before)) or (
        "descriptors, threads, /dev/shm and files as before"
    )
    text = (
        f"{result.cycles} cycles: load {quantile(result.load_seconds, 0.5):.3f} s, unload "
        f"{quantile(result.unload_seconds, 0.5):.3f} s; {result.bytes_per_cycle / 1024:.1f} KiB of "
        f"memory per cycle ({result.before.memory >> 20} MiB before, {result.after.memory >> 20} "
        f"MiB after); {changes}; {result.beside} requests of two models beside, "
        f"{len(result.failed)} failed"
    )
    at = [result.before, result.halfway or result.before, result.after]
    for title in result.after.processes:
        sizes = ", ".join(f"{held.processes[title].memory / (1 << 20):.1f}" for held in at)
        text += f"\n  {title}: {sizes} MiB before, halfway and after"
    if result.failed:
        text += f"\n  {result.failed[0]}"
    if result.with_registered is not None:
        per_model = result.bytes_per_model / (1 << 20)
        text += f"\n{result.registered} registered models take {per_model:.1f} MiB each (< 20)"
    return text
