"""Seconds from a request to its first token by the model's state, and how fast a wake reads."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import checkpoint
from benchmark.client import replay
from benchmark.fleet.served import Fleet
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, random_prompt

RESIDENT, CACHED, COLD, REGISTERED = (
    "resident", "asleep, file in page cache", "asleep, file on disk", "registered, not packed yet",
)  # fmt: skip
STATES = (RESIDENT, CACHED, COLD, REGISTERED)
ASLEEP = (CACHED, COLD)
LIMIT = 0.7
"""Lowest good ratio of a wake's bytes/s to those of reading the file alone."""
_PROMPT = 64
_VOCAB = 512
_BLOCK = 8 << 20


@dataclass
class Result:
    """What was measured, by state."""

    ttft: dict[str, list[float]] = field(default_factory=lambda: {state: [] for state in STATES})
    wake: dict[str, list[float]] = field(default_factory=lambda: {state: [] for state in STATES})
    """Seconds from the beginning of a wake to its end."""
    alone: dict[str, list[float]] = field(default_factory=lambda: {state: [] for state in STATES})
    """Seconds that reading the files into one buffer takes, again and again, by one thread where
    nothing is computed."""
    kept: dict[str, list[float]] = field(default_factory=lambda: {state: [] for state in STATES})
    """Seconds that reading them into new memory takes, which holds all of them."""
    bytes: int = 0
    """Bytes of the files."""
    usages: list[Usage] = field(default_factory=list)

    def speed(self, state: str, *, into_new: bool = False) -> float:
        """Return the bytes/s of the median wake over those of the median reading alone, into one
        buffer or ``into_new`` memory."""
        alone = self.kept if into_new else self.alone
        return quantile(alone[state], 0.5) / quantile(self.wake[state], 0.5)


def _forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read(files: list[Path], buffer: memoryview) -> float:
    began = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - began


def _read_into_new(files: list[Path], buffer: memoryview) -> float:
    """Read pieces of the buffer's size into memory that holds all of them."""
    began = time.perf_counter()
    nbytes = sum(file.stat().st_size for file in files)
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(memory) as left:
            at = 0
            for file in files:
                with file.open("rb", buffering=0) as stream:
                    while count := stream.readinto(left[at : at + len(buffer)]):
                        at += count
        return time.perf_counter() - began


def _put_to_sleep(server: Fleet, name: str, files: list[Path], *, is_cold: bool) -> None:
    """Have the model be awake, then sleep: whatever is read next finds the memory that it has just
    given up. Memory that was given up earlier may first have to come back from a hypervisor."""
    server.do("wake", name)
    server.do("sleep", name)
    if is_cold:
        _forget(files)


def run(*, layers: int | None, tiny: bool, rounds: int) -> Result:
    (folder,) = checkpoint.models(1, tiny=tiny, layers=layers)
    result, rng = Result(), np.random.default_rng(0)
    buffer = memoryview(bytearray(_BLOCK))
    with Fleet([folder], 1) as server:
        (name,) = server.names
        server.pack_all()
        files = [file for file in server.packed.rglob("*") if file.is_file()]
        result.bytes = sum(file.stat().st_size for file in files)
        for turn in range(-1, rounds):
            for state in STATES:
                is_cold = state == COLD
                for into, read in ((result.alone, _read), (result.kept, _read_into_new)):
                    if state in ASLEEP:
                        _put_to_sleep(server, name, files, is_cold=is_cold)
                        seconds = read(files, buffer)
                        if turn >= 0:
                            into[state].append(seconds)
                if state == RESIDENT:
                    server.do("wake", name)
                else:
                    _put_to_sleep(server, name, files, is_cold=is_cold)
                if state == REGISTERED:
                    for file in files:
                        file.unlink()
                request = Request(0.0, name, random_prompt(_PROMPT, _VOCAB, rng), 4)
                with Usage(server) as usage:
                    (answer,) = replay(server.url, [request]).answers
                if not answer.complete:
                    raise RuntimeError(answer.error or f"status {answer.status}")
                if turn >= 0:
                    result.usages.append(usage)
                    result.ttft[state].append(answer.ttft)
                    if state != RESIDENT:
                        result.wake[state].append(server.models()[name]["last_wake_seconds"])
    return result


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("fleet_first_token")
    used = total(result.usages)
    for state in STATES:
        more: dict[str, Any] = {}
        if state != RESIDENT:
            more = {"wake_s": quantile(result.wake[state], 0.5), "bytes": result.bytes}
        if state in ASLEEP:
            more |= {
                "reading_alone_s": quantile(result.alone[state], 0.5),
                "reading_into_new_memory_s": quantile(result.kept[state], 0.5),
                "speed": result.speed(state),
                "speed_to_new_memory": result.speed(state, into_new=True),
                "limit": LIMIT,
            }
        recorder.add(
            f"ttft {state}", result.ttft[state], "s", model=model, parameters=parameters,
            **used, **more,
        )  # fmt: skip
    return recorder


def told(result: Result) -> str:
    lines = []
    for state in STATES:
        line = f"{state}: first token after {quantile(result.ttft[state], 0.5):.3f} s"
        if state != RESIDENT:
            wake = quantile(result.wake[state], 0.5)
            line += f"; the wake took {wake:.3f} s, {result.bytes / wake / 1e9:.2f} GB/s"
        if state in ASLEEP:
            line += (
                f", {result.speed(state):.0%} of reading alone (>= {LIMIT:.0%}) and "
                f"{result.speed(state, into_new=True):.0%} of reading alone into new memory"
            )
        lines.append(line)
    return "\n".join(lines)
