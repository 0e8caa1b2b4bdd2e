"""Measures how fast a model wakes beside another one that answers, and what that one notices.

    python -m benchmark.waking [--quick] [--layers N] [--rounds 5]

One CPU device on one core, so that one core is left to everybody else, drives two checkpoints of
1.72 billion parameters (``--quick``: the tiny ones, for a test). The first decodes a batch without
end. The second sleeps, and is woken with and without the first at work:

- bytes per second of the wake, from ``Wake`` to ``Woken``, and those of one thread that only reads
  the same files into memory that is there already, just before in the same run. The system has the
  files in its page cache, or was told to forget them (``cold``).
- the time between the first one's tokens, while the second is read and while it is not, in turns.
- the time from ``Wake`` to the first token of a prompt that is sent at once, and of one that is
  sent only when all weights are there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosspool.config.cores import keep_off
from crosspool.config.device import Device
from crosspool.transport.messages import Sleep, Slept, StepResult, Wake, Waking, Woken
from rich.console import Console
from rich.table import Table

from benchmark.checkpoint import models
from benchmark.device_driver import DeviceDriver, Generation
from benchmark.records import RESULTS, Recorder
from benchmark.summary import quantile

PIECE_BYTES = 256 << 10
BATCH, CONTEXT, PROMPT = 4, 128, 128
STEPS_BETWEEN = 40
"""Steps of the first model between two wakes, which are the pair of those meanwhile."""
DECODING, SLEEPING = 0, 1


@dataclass
class Measured:
    """What one kind of wake took, round by round."""

    wake_rates: list[float] = field(default_factory=list)
    """GB/s"""
    read_rates: list[float] = field(default_factory=list)
    meanwhile_ms: list[float] = field(default_factory=list)
    """Times between the other model's tokens."""
    without_ms: list[float] = field(default_factory=list)
    load1: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0


class Bench:
    """Two models on one device, of which one may decode all the time."""

    def __init__(self, on: DeviceDriver, files: Sequence[Path]) -> None:
        self._on = on
        self.device = next(iter(on.processes))
        self._files = files
        self.nbytes = sum(file.stat().st_size for file in files)
        self._decoding: list[Generation] = []
        self._step = -1
        self._last = 0.0
        self.gaps: list[float] = []

    def start_decoding(self) -> None:
        self._decoding = [
            Generation(DECODING, [5 + i + j for j in range(CONTEXT)], 4000) for i in range(BATCH)
        ]
        self._step = self._on.step(self._decoding)
        self._last = time.perf_counter()
        self.decode(3)  # the prompt, and what follows it
        self.gaps.clear()

    def stop_decoding(self) -> None:
        self._step, decoding = -1, self._decoding
        self._until(lambda message: isinstance(message, StepResult))
        self._on.release(decoding)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._until(lambda message: isinstance(message, StepResult))

    def sleep(self) -> None:
        self._on.send(self.device, Sleep(model=SLEEPING))
        self._until(lambda message: isinstance(message, Slept))

    def wake(self) -> float:
        """Wake the model and return the seconds that it took."""
        start = time.perf_counter()
        self._on.send(self.device, Wake(model=SLEEPING))
        self._until(lambda message: isinstance(message, Woken))
        return time.perf_counter() - start

    def first_token(self, *, at_once: bool) -> float:
        """Wake the model and return the seconds until the first token of a prompt."""
        asked = Generation(SLEEPING, list(range(7, 7 + PROMPT)), 1)
        start = time.perf_counter()
        self._on.send(self.device, Wake(model=SLEEPING))
        if not at_once:
            self._until(lambda message: isinstance(message, Woken))
        self._on.step([asked])
        took: list[float] = []
        missing = 2 if at_once else 1  # the token, and word that all weights are there

        def arrived(message: object) -> bool:
            nonlocal missing
            if isinstance(message, StepResult):
                took.append(time.perf_counter() - start)
            missing -= isinstance(message, StepResult | Woken)
            return missing == 0

        self._until(arrived)
        self._on.release([asked])
        return took[0]

    def read_alone(self) -> float:
        """Read the files in one thread and return the seconds that it took, while the other model
        decodes if it does."""
        buffer = memoryview(bytearray(PIECE_BYTES))
        took: list[float] = []

        def read() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            start = time.perf_counter()
            for path in self._files:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
            took.append(time.perf_counter() - start)

        thread = threading.Thread(target=read)
        thread.start()
        while thread.is_alive():
            if self._step >= 0:
                self.decode(1)
            else:
                thread.join()
        return took[0]

    def forget(self) -> None:
        """Have the system forget the files' content."""
        for path in self._files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _until(self, wanted: Callable[[object], bool]) -> None:
        """Take messages up to the first that is wanted; the other model's next step follows each
        of its results."""
        while True:
            _, message = self._on.receive(600)
            if isinstance(message, StepResult) and message.step == self._step:
                now = time.perf_counter()
                self.gaps.append((now - self._last) * 1000)
                self._last = now
                self._on.take(self._decoding, message)
                self._step = self._on.step(self._decoding)
            else:
                assert isinstance(message, Waking | Woken | Slept | StepResult), message
            if wanted(message):
                return


def measure(bench: Bench, rounds: int, *, busy: bool, cold: bool) -> Measured:
    found = Measured(load1=os.getloadavg()[0])
    began, cpu = time.perf_counter(), time.process_time()
    if busy:
        bench.start_decoding()
    for _ in range(rounds):
        bench.sleep()
        if cold:
            bench.forget()
        found.read_rates.append(bench.nbytes / bench.read_alone() / 1e9)
        if cold:
            bench.forget()
        if busy:
            bench.gaps.clear()
            bench.decode(STEPS_BETWEEN)
            found.without_ms += bench.gaps
            bench.gaps.clear()
        found.wake_rates.append(bench.nbytes / bench.wake() / 1e9)
        found.meanwhile_ms += bench.gaps
    if busy:
        bench.stop_decoding()
    found.wall_s, found.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.waking", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument("--layers", type=int, help="layers of the checkpoints; 16 unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of records")
    given = parser.parse_args(words)
    rounds = 1 if given.quick else given.rounds
    recorder = Recorder("waking", told=_tell)  # which counts the cores that may be used
    keep_off([Device("cpu:0")])  # as the launcher does
    paths = models(2, tiny=given.quick, layers=given.layers)
    table = Table("wake", "GB/s", "file alone, GB/s", "share", "TBT P50", "TBT P99")
    with (
        tempfile.TemporaryDirectory(prefix="crosspool-waking-", dir=paths[0].parent) as cache,
        DeviceDriver(
            paths,
            ready_timeout=600,
            packed_cache_dir=cache,
            packed_cache_bytes=16 << 30,
            weight_pool_bytes=16 << 30,
            kv_pool_bytes=512 << 20,
            page_size=16,
        ) as on,
    ):
        files = _packed(Path(cache), paths[SLEEPING].name)
        bench = Bench(on, files)
        for busy, cold in ((False, False), (False, True), (True, False), (True, True)):
            found = measure(bench, rounds, busy=busy, cold=cold)
            name = f"{'beside another' if busy else 'alone'}, {'cold' if cold else 'page cache'}"
            _add(recorder, table, name, found, paths[0].name)
        spent: dict[str, Any] = {"load1": os.getloadavg()[0], "cpu_s": 0.0, "wall_s": 0.0}
        for at_once in (True, False):
            seconds = []
            for _ in range(rounds):
                bench.sleep()
                seconds.append(bench.first_token(at_once=at_once))
            name = f"first token, {'sent with the wake' if at_once else 'sent when woken'}"
            parameters = {"prompt": PROMPT}
            recorder.add(name, seconds, "s", parameters=parameters, **spent)
            table.add_row(name, *[""] * 4, f"{quantile(seconds, 0.5):.3f} s")
    Console().print(table)
    print(recorder.write(given.output))
    return 0


def _tell(row: dict[str, Any]) -> None:
    print(f"{row['name']}: {row['median']:g} {row['unit']}, P99 {row['p99']:g}", flush=True)


def _packed(cache: Path, name: str) -> list[Path]:
    """The files of packed weights of a model, once they have been written."""
    while len(found := sorted(cache.glob(f"{name}-*.packed"))) < 2:
        time.sleep(0.1)
    return found


def _add(recorder: Recorder, table: Table, name: str, found: Measured, model: str) -> None:
    spent: dict[str, Any] = {
        "load1": found.load1,
        "cpu_s": found.cpu_s,
        "wall_s": found.wall_s,
        "model": model,
    }
    parameters = {"batch": BATCH, "context": CONTEXT}
    shares = [wake / read for wake, read in zip(found.wake_rates, found.read_rates, strict=True)]
    rows = {
        "wake": (found.wake_rates, "GB/s"),
        "file alone": (found.read_rates, "GB/s"),
        "share": (shares, "1"),
        "tbt meanwhile": (found.meanwhile_ms, "ms"),
        "tbt without": (found.without_ms, "ms"),
    }
    said = []
    for what, (values, unit) in rows.items():
        if values:
            recorder.add(f"{name}: {what}", values, unit, parameters=parameters, **spent)
        said.append(values)
    wakes, reads, share, meanwhile, without = said
    cells = [f"{quantile(values, 0.5):.2f}" for values in (wakes, reads, share)]
    for q in (0.5, 0.99):
        both = [quantile(values, q) if values else 0.0 for values in (meanwhile, without)]
        cells.append(f"{both[0]:.1f} / {both[1]:.1f} ms" if both[1] else "")
    table.add_row(name, *cells)


if __name__ == "__main__":
    sys.exit(main())
