"""Serves a model that takes most of a small machine's memory: random weights in the exact shape of
Qwen3-30B-A3B, in int4 (16.7 GB).

    python -m benchmark.large [--tokens 64] [--runs 5] [--quick] [--keep]

Tells how long loading takes, how much memory the processes with weights ever hold, pages of files
apart, over the bytes of the weights, and the time per token at an HTTP client against the floor:
the time in which the same cores read a step's bytes. The checkpoint is written first (17 GB of
disk) and removed afterwards, unless ``--keep`` is given. With ``--quick`` the model has two layers
of eight experts, and nothing is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from crosspool.models.registry import read_model
from crosspool.weightpool.placement import FFNShard, attention_bytes, ffn_bytes

from benchmark import floors, int4_checkpoint, machine
from benchmark.checkpoint import Shape, cache_dir
from benchmark.client import STREAM_FLAGS, replay
from benchmark.records import Recorder
from benchmark.server import Server
from benchmark.summary import quantile
from benchmark.usage import Usage, total
from benchmark.workload import Request, random_prompt

SHAPE = Shape("qwen3-30b-a3b-int4", 2048, 48, 128, 8, 768, 32, 4, 128, 151_936, context=40_960)
QUICK = replace(SHAPE, name="qwen3-a-little-int4", layers=2, experts=8, vocabulary=512)
MEMORY_LIMIT = 1.1
"""Most memory while loading that is good, over the bytes of the weights."""
FLOOR_LIMIT = 1.2
_PROMPT = 64
_LOOK_SECONDS = 0.1
_WITH_WEIGHTS = ("crosspool::weights", "crosspool::device")
"""What the titles of processes with weights begin with."""
_DEVICE_READY = re.compile(r"device \S+ is ready \(([\d.]+) s\)")


class Held:
    """The memory of a server's processes with weights: what is theirs or shared between them, and
    not the pages of files, which the system takes back whenever it needs them."""

    def __init__(self) -> None:
        self.most = 0
        """Bytes."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at it many times a second within the ``with``."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(_LOOK_SECONDS):
                self.most = max(self.most, _held_bytes())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _held_bytes() -> int:
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if " ".join(process.cmdline()).startswith(_WITH_WEIGHTS):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                fields = dict(line.split(":", 1) for line in lines[1:])
                kib = [fields[name].split()[0] for name in ("Pss_Anon", "Pss_Shmem")]
                count += 1024 * sum(map(int, kib))
    return count


def run(folder: Path, *, tokens: int, runs: int) -> tuple[Recorder, str]:
    """Serve the checkpoint; return the figures, and what they say."""
    spec = read_model(folder)
    shard = FFNShard(rank=0, ranks=1, parallel="tp")
    weights = attention_bytes(spec, True) + ffn_bytes(spec, shard, True)
    cores = sorted(os.sched_getaffinity(0))
    device = "cpu:" + "+".join(map(str, cores))
    flags = [
        *("--kv-pool-devices", device, "--weight-pool-devices", device),
        *("--kv-pool-bytes", "512MiB", "--context-length", "4096", *STREAM_FLAGS),
    ]
    recorder, held, load1 = Recorder("large"), Held(), machine.load1()
    parameters = {"tokens": tokens, "cores": len(cores)}
    both: dict[str, Any] = {"model": folder.name, "parameters": parameters}
    began = time.perf_counter()
    with held.watched(), Server(flags, [str(folder)], 1800.0) as server:
        ready = time.perf_counter() - began
        (loading,) = (float(seconds) for seconds in _DEVICE_READY.findall(server.log))
        cpu = sum(server.cpu_seconds().values())
        rng = np.random.default_rng(0)
        gaps: list[float] = []
        with Usage(server) as usage:
            for _ in range(runs):
                prompt = random_prompt(_PROMPT, spec.vocab, rng)
                (answer,) = replay(server.url, [Request(0.0, folder.name, prompt, tokens)]).answers
                if not answer.complete:
                    raise RuntimeError(answer.error or str(answer.status))
                gaps += answer.tbt[1:]
    floor = floors.step_seconds(cores, spec, 1, _PROMPT + tokens // 2)
    step, least = quantile(gaps, 0.5), quantile(floor, 0.5)
    taken: dict[str, Any] = {"cpu_s": cpu, "wall_s": ready, "load1": load1}
    recorder.add("device ready", [loading], "s", **both, **taken, server_ready_s=ready)
    recorder.add(
        "most memory of the processes with weights", [held.most], "B", **both, **taken,
        weights=weights, ratio=held.most / weights, limit=MEMORY_LIMIT,
    )  # fmt: skip
    recorder.add(
        "tbt", gaps, "s", **both, **total([usage]),
        ratio_to="floor", ratio=step / least, limit=FLOOR_LIMIT, floor=least,
    )  # fmt: skip
    return recorder, (
        f"{weights / 1e9:.2f} GB of weights: the device is ready after {loading:.1f} s, the server "
        f"after {ready:.1f} s; at most {held.most / 1e9:.2f} GB of memory, "
        f"{held.most / weights:.3f} of them (<= {MEMORY_LIMIT}); {1e3 * step:.1f} ms per token, "
        f"{step / least:.2f} of the floor of {1e3 * least:.1f} ms (<= {FLOOR_LIMIT})"
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.large",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--runs", type=int, default=5, help="answers")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint on the disk")
    parser.add_argument("--quick", action="store_true", help="a small model; records nothing")
    given = parser.parse_args(words)
    shape = QUICK if given.quick else SHAPE
    folder = cache_dir() / "models" / shape.name
    try:
        if not (folder / "config.json").is_file():
            int4_checkpoint.write(folder, shape)
        recorder, told = run(folder, tokens=given.tokens, runs=given.runs)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(told)
    if not given.quick:
        recorder.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
