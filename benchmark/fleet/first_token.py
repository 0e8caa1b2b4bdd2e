"""Seconds from a request to its first token by the model's state, and how fast a wake reads."""

from __future__ import annotations

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

STATES = ("resident", "asleep, file in page cache", "asleep, file on disk")
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
    """Seconds that reading the files takes where nothing is computed."""
    bytes: int = 0
    """Bytes of the files."""
    usages: list[Usage] = field(default_factory=list)

    def speed(self, state: str) -> float:
        """Return the bytes/s of the median wake over those of the median reading alone."""
        return quantile(self.alone[state], 0.5) / quantile(self.wake[state], 0.5)


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
                is_cold = state == STATES[2]
                if state == STATES[0]:
                    server.do("wake", name)
                else:
                    server.do("sleep", name)
                    if is_cold:
                        _forget(files)
                    seconds = _read(files, buffer)
                    if is_cold:
                        _forget(files)
                    if turn >= 0:
                        result.alone[state].append(seconds)
                request = Request(0.0, name, random_prompt(_PROMPT, _VOCAB, rng), 4)
                with Usage(server) as usage:
                    (answer,) = replay(server.url, [request]).answers
                if not answer.complete:
                    raise RuntimeError(answer.error or f"status {answer.status}")
                if turn >= 0:
                    result.usages.append(usage)
                    result.ttft[state].append(answer.ttft)
                    if state != STATES[0]:
                        result.wake[state].append(server.models()[name]["last_wake_seconds"])
    return result


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    recorder = Recorder("fleet_first_token")
    used = total(result.usages)
    for state in STATES:
        more: dict[str, Any] = {}
        if state != STATES[0]:
            more = {
                "wake_s": quantile(result.wake[state], 0.5),
                "reading_alone_s": quantile(result.alone[state], 0.5),
                "bytes": result.bytes,
                "speed": result.speed(state),
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
        if state != STATES[0]:
            wake = quantile(result.wake[state], 0.5)
            line += (
                f"; the wake took {wake:.3f} s, {result.bytes / wake / 1e9:.2f} GB/s, "
                f"{result.speed(state):.0%} of reading alone (>= {LIMIT:.0%})"
            )
        lines.append(line)
    return "\n".join(lines)
