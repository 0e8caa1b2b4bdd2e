"""Measures decoding with a part of the routed experts in memory, against all of them.

    python -m benchmark.experts [--quick] [--skew 0.5] [--batch 1 8] [--rounds 3] [--storage]

A checkpoint whose routers prefer some experts (benchmark/checkpoint.py says how much, and what
trained models do) is decoded by one device of all cores: with all experts in memory, and with an
expert pool of 100, 75, 50 and 25 % of their bytes. Requests come one batch after another, each with
a random prompt, and draw their tokens at temperature 1. Every budget answers the same requests, and
must choose the same tokens. The first requests fill the pool and are not counted. Budgets take
turns. What is not in the pool is in the page cache, unless ``--storage`` is given: then the packed
file is dropped from there all the time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from crosspool.models.registry import read_model
from crosspool.transport.messages import Sampling, StepResult
from crosspool.weightpool.experts import GRANULE
from crosspool.weightpool.placement import FFNShard, ffn_bytes
from rich.console import Console
from rich.table import Table

from benchmark import machine
from benchmark.checkpoint import models
from benchmark.decoding import one_device
from benchmark.device_driver import DeviceDriver, Generation
from benchmark.records import RESULTS, Recorder
from benchmark.summary import quantile

SHARES = (None, 1.0, 0.75, 0.5, 0.25)
"""Bytes of the pool over those of all routed experts; None: they are in memory without a pool."""
PROMPT = 64
LEASE = 32
_ORDINARY = 100
_DROP_SECONDS = 0.01
_WHOLE = FFNShard(rank=0, ranks=1, parallel="tp")


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    warm: int = 6
    """Batches of requests that fill the pool."""
    batches: int = 6
    tokens: int = 96
    """New tokens of each request."""


@dataclass
class Run:
    """What one budget did in one round."""

    step_ms: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """What has changed in the device's counts of experts."""
    rss_bytes: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    load1: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of one request per second."""
        return 1e3 / float(np.mean(self.step_ms))

    @property
    def hit_rate(self) -> float:
        needed = self.counts["hits"] + self.counts["misses"]
        return self.counts["hits"] / needed if needed else 1.0


def measure(on: DeviceDriver, batch: int, amount: Amount) -> Run:
    """Decode the requests that every budget decodes."""
    random, run = np.random.default_rng(7), Run(load1=machine.load1())
    (device,) = on.processes
    vocab = on.specs[0].vocab
    for number in range(amount.warm + amount.batches):
        group = [
            Generation(
                0,
                random.integers(_ORDINARY, vocab, PROMPT).tolist(),
                amount.tokens,
                sampling=Sampling(temperature=1.0, seed=1000 * number + request),
            )
            for request in range(batch)
        ]
        counted = number >= amount.warm
        before = _counts(on, device) if counted else {}
        cpu, start = _cpu_seconds(on), time.perf_counter()
        times = _decode(on, group)
        if counted:
            run.step_ms += [1e3 * (b - a) for a, b in pairwise(times)]
            run.cpu_s += _cpu_seconds(on) - cpu
            run.wall_s += time.perf_counter() - start
            for name, value in _counts(on, device).items():
                run.counts[name] += value - before.get(name, 0.0)
        run.outputs += [one.output for one in group]
        on.release(group)
    run.rss_bytes = on.inspect(device, "pools")["rss_bytes"]
    return run


def _decode(on: DeviceDriver, group: list[Generation]) -> list[float]:
    """Run requests to their end; return the times of the first token and of all after it."""
    times: list[float] = []
    while not group[0].done:
        left = group[0].new_tokens - len(group[0].output)
        on.step(group, lease=min(LEASE, left) if group[0].output else 1)
        more = True
        while more:
            _, message = on.receive()
            assert isinstance(message, StepResult), message
            on.take(group, message)
            times.append(time.perf_counter())
            more = message.more
    return times


def _counts(on: DeviceDriver, device: str) -> dict[str, float]:
    found = on.inspect(device, "counters")["experts"]
    return {name: value for name, value in found[0].items() if name != "model"} if found else {}


def _cpu_seconds(on: DeviceDriver) -> float:
    import psutil

    times = [psutil.Process(process.pid).cpu_times() for process in on.processes.values()]
    return float(sum(of.user + of.system for of in times))


@contextlib.contextmanager
def _dropped(folder: Path, wanted: bool) -> Iterator[None]:
    """Keep files of packed FFN weights out of the page cache, if ``wanted``."""
    ended = threading.Event()

    def drop() -> None:
        files = [os.open(path, os.O_RDONLY) for path in folder.glob("*-ffn.*.packed")]
        while not ended.wait(_DROP_SECONDS):
            for file in files:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        for file in files:
            os.close(file)

    thread = threading.Thread(target=drop)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if wanted:
            thread.join()


def device(checkpoint: Path, cache: Path, share: float | None) -> DeviceDriver:
    """Start a device with one budget."""
    spec = read_model(checkpoint)
    every = ffn_bytes(spec, _WHOLE, experts=True)
    fields: dict[str, Any] = {"weight_pool_bytes": 2 * ffn_bytes(spec, _WHOLE)}
    if share is not None:
        room = -(-int(share * every) // GRANULE) * GRANULE
        fields |= {"experts": "demand", "expert_pool_bytes": room}
    cores = one_device(sorted(os.sched_getaffinity(0)))
    return DeviceDriver(
        [checkpoint],
        cores.kv,
        cores.weights,
        ready_timeout=900.0,
        packed_cache_dir=str(cache),
        packed_cache_bytes=64 << 30,
        kv_pool_bytes=256 << 20,
        page_size=16,
        lanes=2,
        **fields,
    )


def pack(checkpoint: Path, cache: Path) -> None:
    """Have the packed files written to the disk, which would hold up whoever is measured first."""
    with device(checkpoint, cache, 1.0):
        pass
    os.sync()


def run_budget(
    checkpoint: Path, cache: Path, share: float | None, batches: Sequence[int], given: Any
) -> dict[int, Run]:
    """Start a device with one budget and measure it with each batch size."""
    amount = Amount(warm=1, batches=1, tokens=12) if given.quick else Amount()
    with device(checkpoint, cache, share) as on, _dropped(cache, given.storage):
        return {batch: measure(on, batch, amount) for batch in batches}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.experts", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--skew", type=float, default=0.5, help="how uneven routers choose")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="layers of the checkpoint; 16 unless given")
    parser.add_argument("--storage", action="store_true", help="nothing is in the page cache")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of records")
    given = parser.parse_args(words)
    (checkpoint,) = models(1, tiny=given.quick, layers=given.layers, skew=given.skew)
    runs: dict[tuple[float | None, int], list[Run]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="crosspool-experts-", dir=checkpoint.parent) as cache:
        pack(checkpoint, Path(cache))
        for round_ in range(1 if given.quick else given.rounds):
            for share in SHARES:
                found = run_budget(checkpoint, Path(cache), share, given.batch, given)
                for batch, run in found.items():
                    runs[share, batch].append(run)
                    right = runs[None, batch][0].outputs
                    if run.outputs != right:
                        print(f"{_named(share)}: other tokens than with all", file=sys.stderr)
                        return 1
                    said = f"round {round_}, batch {batch}, {_named(share)}"
                    print(f"{said}: {run.tokens_per_s:.1f} tokens/s, {run.hit_rate:.1%} found")
    print(_record(given, checkpoint.name, runs))
    return 0


def _named(share: float | None) -> str:
    return "all in memory" if share is None else f"pool of {share:.0%}"


def _record(
    given: argparse.Namespace, model: str, runs: dict[tuple[float | None, int], list[Run]]
) -> str:
    recorder = Recorder("experts_storage" if given.storage else "experts")
    table = Table(
        *("batch", "experts", "tokens/s", "of all", "found", "read early, used"),
        *("MB read per step", "stalled", "P99 step", "memory"),
    )
    for (share, batch), of in runs.items():
        steps = sum(len(run.step_ms) for run in of)
        rates = [run.tokens_per_s for run in of]
        whole = [run.tokens_per_s for run in runs[None, batch]]
        ratio = quantile(rates, 0.5) / quantile(whole, 0.5)
        total = {name: sum(run.counts[name] for run in of) for name in of[0].counts}
        read = total.get("read_bytes", 0.0) / steps / 1e6
        stalled = total.get("stall_seconds", 0.0) / sum(run.wall_s for run in of)
        early, used = total.get("early", 0.0), total.get("early_used", 0.0)
        hit_rate = quantile([run.hit_rate for run in of], 0.5)
        p99 = quantile([ms for run in of for ms in run.step_ms], 0.99)
        rss = of[-1].rss_bytes
        recorder.add(
            _named(share), rates, "tokens/s", model=model,
            parameters={
                "share": share, "batch": batch, "skew": given.skew, "storage": given.storage,
                "prompt": PROMPT,
            },
            cpu_s=sum(run.cpu_s for run in of), wall_s=sum(run.wall_s for run in of),
            load1=of[0].load1, ratio=ratio, hit_rate=hit_rate, read_mb_per_step=read,
            stalled_share=stalled, p99_step_ms=p99, early=early, early_used=used, rss_bytes=rss,
        )  # fmt: skip
        table.add_row(
            *(str(batch), _named(share), f"{quantile(rates, 0.5):.1f}", f"{ratio:.2f}"),
            *(f"{hit_rate:.1%}", f"{used / early:.0%}" if early else "", f"{read:.1f}"),
            *(f"{stalled:.0%}", f"{p99:.1f} ms", f"{rss / 1e9:.2f} GB"),
        )
    Console().print(table)
    return "nothing is recorded" if given.quick else str(recorder.write(given.output))


if __name__ == "__main__":
    sys.exit(main())
