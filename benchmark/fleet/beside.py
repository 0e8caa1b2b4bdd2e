"""Time between tokens of two models while a third wakes and sleeps, or comes and goes, against none
doing so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmark import checkpoint
from benchmark.client import replay
from benchmark.fleet.served import Fleet, timed
from benchmark.http_tbt import make_load
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.usage import Usage, total

LIMIT = 1.15
"""Highest good ratio of the P99 beside wakes to the P99 without."""
CASES = ("without", "beside")


@dataclass
class Result:
    """What was measured in all turns."""

    tbt: dict[str, list[list[float]]] = field(default_factory=lambda: {case: [] for case in CASES})
    """Seconds between tokens, by case and turn."""
    failed: list[str] = field(default_factory=list)
    wake_seconds: list[float] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)
    unload_seconds: list[float] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    def ratio(self, q: float) -> float:
        """Return the median, over all turns, of the ratio at quantile ``q``."""
        pairs = zip(self.tbt["beside"], self.tbt["without"], strict=True)
        return quantile([quantile(a, q) / quantile(b, q) for a, b in pairs], 0.5)


@contextmanager
def _changing(server: Fleet, folder: Path, result: Result, *, loads: bool) -> Iterator[None]:
    """Have the model wake and sleep all the time within the ``with``; if it ``loads``, it is loaded
    before and unloaded after each time."""
    name = folder.name
    over = threading.Event()
    problems: list[Exception] = []

    def go_on() -> None:
        try:
            while not over.is_set():
                if loads:
                    with timed(result.load_seconds):
                        server.load(folder)
                result.wake_seconds.append(server.do("wake", name)["last_wake_seconds"])
                server.do("sleep", name)
                if loads:
                    with timed(result.unload_seconds):
                        server.unload(name)
        except (RuntimeError, OSError) as error:
            problems.append(error)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if problems:
        raise problems[0]


def _with_own_tokenizer(folder: Path, parent: Path) -> Path:
    """Return a folder of the same name and content in ``parent``, but for a tokenizer that is not
    known to be the same."""
    other = parent / folder.name
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).symlink_to(path)
    config = other / "tokenizer_config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(f"{text}\n")
    return other


def run(
    *, layers: int | None, tiny: bool, rate: float, seconds: float, rounds: int,
    loads: bool = False, own_tokenizer: bool = False,
) -> Result:  # fmt: skip
    """Take ``rounds`` turns of both cases, each with the same requests at the same times. All
    models have the same tokenizer, unless the third has its ``own_tokenizer``."""
    folders = checkpoint.models(3, tiny=tiny, layers=layers)
    with TemporaryDirectory() as parent:
        if own_tokenizer:
            folders[2] = _with_own_tokenizer(folders[2], Path(parent))
        return _take_turns(folders, rate=rate, seconds=seconds, rounds=rounds, loads=loads)


def _take_turns(
    folders: list[Path], *, rate: float, seconds: float, rounds: int, loads: bool
) -> Result:
    result = Result()
    with Fleet(folders, 3, ["--lanes", "3"]) as server, Progress(refresh_per_second=2) as progress:
        busy = server.names[:2]
        server.pack_all()
        if loads:
            server.unload(folders[2].name)
        for name in busy:
            server.do("pin", name)
        replay(server.url, make_load(busy, rate, 3.0, np.random.default_rng(99)))
        task = progress.add_task("", total=rounds * len(CASES))
        for turn in range(rounds):
            load = make_load(busy, rate, seconds, np.random.default_rng(turn))
            for case in CASES[:: -1 if turn % 2 else 1]:
                progress.update(task, description=f"round {turn + 1}: {case}")
                server.wait_idle()
                changing = (
                    _changing(server, folders[2], result, loads=loads)
                    if case == "beside"
                    else nullcontext()
                )
                with Usage(server) as usage, changing:
                    answers = replay(server.url, load).answers
                result.usages.append(usage)
                result.failed += [a.error or str(a.status) for a in answers if not a.complete]
                result.tbt[case].append([gap for a in answers if a.complete for gap in a.tbt])
                progress.advance(task)
    return result


def record(result: Result, model: str, parameters: dict[str, Any]) -> Recorder:
    name = "fleet_loads" if result.load_seconds else "fleet_beside"
    recorder = Recorder(f"{name}_own_tokenizer" if parameters["own_tokenizer"] else name)
    for case in CASES:
        more: dict[str, Any] = {}
        if case == "beside":
            ratios = {"ratio": result.ratio(0.5), "ratio_p99": result.ratio(0.99)}
            wakes = {"wakes": len(result.wake_seconds), "failed": len(result.failed)}
            wakes["loads"] = len(result.load_seconds)
            more = {"ratio_to": "without", "limit": LIMIT, **ratios, **wakes}
        gaps = [gap for turn in result.tbt[case] for gap in turn]
        recorder.add(
            f"tbt {case}", gaps, "s", model=model, parameters=parameters,
            **total(result.usages), **more,
        )  # fmt: skip
    return recorder


def told(result: Result) -> str:
    p99 = {
        case: 1e3 * quantile([gap for turn in turns for gap in turn], 0.99)
        for case, turns in result.tbt.items()
    }
    wakes = result.wake_seconds
    loads = ""
    if result.load_seconds:
        loads = (
            f", {len(result.load_seconds)} loads of {quantile(result.load_seconds, 0.5):.2f} s and "
            f"unloads of {quantile(result.unload_seconds, 0.5):.2f} s"
        )
    return (
        f"TBT P99 {p99['without']:.1f} ms without, {p99['beside']:.1f} ms beside "
        f"{len(wakes)} wakes of {quantile(wakes, 0.5):.2f} s{loads}; paired ratio P50 "
        f"{result.ratio(0.5):.2f}, P99 {result.ratio(0.99):.2f} (<= {LIMIT}); "
        f"{len(result.failed)} failed"
    )
