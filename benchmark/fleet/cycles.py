"""What a server holds of models that have come and gone, and of those that are registered."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosspool.config.runtime_dir import find_running
from rich.progress import track

from benchmark import checkpoint
from benchmark.fleet.served import Fleet, timed
from benchmark.records import Recorder
from benchmark.server import DEMO
from benchmark.summary import quantile
from benchmark.usage import Usage, total

_WARM_UP = 20
"""Cycles after which what is made once has been made."""
_SETTLE_SECONDS = 3.0
MOST_REGISTERED = 20 << 20
"""Bytes that a model may take of all processes together while it sleeps."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one process holds."""

    rss: int
    """Bytes of its own memory: the private part of what is resident."""
    descriptors: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What the whole server holds."""

    processes: dict[str, Held]
    """By title, without the processes that compile one grammar."""
    shared: int
    """Files in /dev/shm."""
    files: int
    """Files in the runtime folder."""

    @property
    def rss(self) -> int:
        return sum(held.rss for held in self.processes.values())

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
    registered: int = 0
    """Models that were loaded at the end, none of which was ever woken."""
    with_registered: Holding | None = None
    load_seconds: list[float] = field(default_factory=list)
    unload_seconds: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    @property
    def bytes_per_cycle(self) -> float:
        return (self.after.rss - self.before.rss) / self.cycles

    @property
    def bytes_per_model(self) -> float:
        """Return the bytes that each registered model takes of all processes together."""
        if self.with_registered is None:
            return 0.0
        return (self.with_registered.rss - self.after.rss) / self.registered


def holding(server: Fleet) -> Holding:
    """Return what the server holds once its threads have ended."""
    time.sleep(_SETTLE_SECONDS)
    found = {}
    for title, process in server.processes().items():
        if "one grammar" in title:
            continue
        memory = process.memory_full_info()
        found[title] = Held(
            rss=memory.uss, descriptors=process.num_fds(), threads=process.num_threads()
        )
    folder = Path(find_running(server.port).runtime_dir)
    return Holding(
        processes=found,
        shared=len(os.listdir("/dev/shm")),
        files=sum(len(files) for _, _, files in os.walk(folder)),
    )


def run(*, layers: int | None, tiny: bool, cycles: int, registered: int) -> Result:
    """Load and unload one model ``cycles`` times beside another one; then load ``registered``
    models, copies of a tiny one."""
    served, coming = checkpoint.models(2, tiny=tiny, layers=layers)
    load_seconds: list[float] = []
    unload_seconds: list[float] = []

    def cycle(number: int) -> None:
        name = f"{coming.name}-{number % 10}"
        with timed(load_seconds):
            server.load(coming, name)
        with timed(unload_seconds):
            server.unload(name)

    with Fleet([served], 2, ["--kv-pool-bytes", "1GiB"]) as server:
        for number in range(_WARM_UP):
            cycle(number)
        load_seconds.clear()
        unload_seconds.clear()
        before = holding(server)
        with Usage(server) as usage:
            for number in track(range(cycles), "cycles"):
                cycle(number)
        result = Result(cycles, before, holding(server), registered)
        result.load_seconds, result.unload_seconds = load_seconds, unload_seconds
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
        changes=result.after.difference(result.before), **usage,
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
        f"memory per cycle ({result.before.rss >> 20} MiB before, {result.after.rss >> 20} MiB "
        f"after); {changes}"
    )
    if result.with_registered is not None:
        per_model = result.bytes_per_model / (1 << 20)
        text += f"; {result.registered} registered models take {per_model:.1f} MiB each (< 20)"
    return text
