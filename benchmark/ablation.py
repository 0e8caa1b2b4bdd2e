"""Repeats the paper's ablation: layer-wise pipeline and resident loop, each on and off.

    python -m benchmark.ablation [--quick]

Three models decode at once on two devices, a core for the KV pool and one for the weight pool. They
have one lane or two, and run under the host loop (Python drives every layer) or the resident loop.
The four variants take turns. The models are the checkpoint that engines are compared on, cut to
four layers, so that three models for each variant fit into memory (12 GB).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark import checkpoint, plots
from benchmark.decoding import Engine, Loop, two_devices
from benchmark.records import IMAGES, Recorder
from benchmark.turns import Case, Measured, record_case, take_turns

MODELS = 3
LAYERS = 4
CONTEXT = 256
LOOPS: tuple[Loop, ...] = ("host", "resident")
LIMITS = {("resident", 2): 2.0, ("host", 2): 1.1, ("resident", 1): 1.1}
"""Lowest gain that is good, by loop and number of lanes."""


@dataclass
class Arm:
    """One of the four variants."""

    loop: Loop
    lanes: int
    case: Case
    tokens_per_s: list[float]
    """Tokens per second of all models together, by turn. The first turn does not count."""

    @property
    def name(self) -> str:
        return f"{self.loop} loop, {'one lane' if self.lanes == 1 else 'two lanes'}"

    @property
    def rates(self) -> list[float]:
        return self.tokens_per_s[1:]

    def gain(self, over: Arm) -> float:
        """Return the median, over all turns, of its tokens/s divided by those of ``over``."""
        return median(own / others for own, others in zip(self.rates, over.rates, strict=True))


def arm(engine: Engine, model: str, batch: int, steps: int) -> Arm:
    setup, rates = engine.setup, list[float]()

    def take() -> Measured:
        decoded = engine.decode(batch, CONTEXT, steps)
        rates.append(decoded.tokens_per_s)
        return Measured(decoded.all_ms, decoded.cpu_s, decoded.wall_s)

    made = Arm(setup.loop, setup.lanes, Case("", take, model, batch, CONTEXT, 2, MODELS), rates)
    made.case.name = f"{made.name}, batch {batch}"
    return made


@dataclass(frozen=True)
class Split:
    """Gain of pipeline and resident loop together, and of each alone."""

    both: float
    overlap: float
    """Gain of two lanes over one, under the host loop."""
    no_python: float
    """Gain of the resident loop over the host loop, with one lane."""
    overlap_without_python: float
    """Gain of two lanes over one, under the resident loop."""
    no_python_with_overlap: float
    """Gain of the resident loop over the host loop, with two lanes."""


def split(arms: Sequence[Arm]) -> Split:
    found = {(arm.loop, arm.lanes): arm for arm in arms}
    off, pipeline = found["host", 1], found["host", 2]
    resident, both = found["resident", 1], found["resident", 2]
    return Split(
        both=both.gain(off),
        overlap=pipeline.gain(off),
        no_python=resident.gain(off),
        overlap_without_python=both.gain(resident),
        no_python_with_overlap=both.gain(pipeline),
    )


def table(arms: Sequence[Arm]) -> Table:
    title = f"{MODELS} models at once on two devices"
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    made.add_column("", no_wrap=True)
    columns = ("batch", "tokens/s", "step ms", "P99 ms", "gain", "cores\nin use", "others'\nCPU")
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for batch in sorted({arm.case.batch for arm in arms}):
        own = [arm for arm in arms if arm.case.batch == batch]
        for arm in own:
            case, gain = arm.case, arm.gain(own[0])
            limit = LIMITS.get((arm.loop, arm.lanes))
            shown = f"{gain:.2f}"
            if limit is not None:
                shown = f"[{'green' if gain >= limit else 'red'}]{shown}[/] (>= {limit:g})"
            cores = sum(t.cpu_s for t in case.turns) / sum(t.wall_s for t in case.turns)
            made.add_row(
                arm.name,
                str(batch),
                f"{median(arm.rates):.1f}",
                f"{case.median:.2f}",
                f"{case.p99:.2f}",
                shown,
                f"{cores:.2f}",
                f"{case.other_cpu_share:.0%}",
            )
    return made


def record(arms: Sequence[Arm]) -> Recorder:
    recorder = Recorder("ablation")
    for batch in sorted({arm.case.batch for arm in arms}):
        own = [arm for arm in arms if arm.case.batch == batch]
        for arm in own:
            record_case(
                recorder,
                arm.case,
                ratio_to=own[0].case.name,
                ratio=arm.gain(own[0]),
                tokens_per_s=median(arm.rates),
                tokens_per_s_of_turns=[round(rate, 2) for rate in arm.rates],
                loop=arm.loop,
                lanes=arm.lanes,
            )
    return recorder


def plot(arms: Sequence[Arm], path: Path) -> None:
    batches = sorted({arm.case.batch for arm in arms})
    figure, axes = plots.panels([f"Tokens/s of three models, batch {b}" for b in batches])
    for axis, batch in zip(axes, batches, strict=True):
        own = [arm for arm in arms if arm.case.batch == batch]
        colors = [plots.COLORS[LOOPS.index(arm.loop)] for arm in own]
        bars = axis.bar(
            [arm.name.replace(", ", ",\n") for arm in own],
            [median(arm.rates) for arm in own],
            color=colors,
        )
        axis.bar_label(bars, [f"{arm.gain(own[0]):.2f}" for arm in own], fontsize=8)
    plots.save(figure, path)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.ablation", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a tiny model; records nothing"
    )
    parser.add_argument("--results", type=Path, help="folder of the records")
    given = parser.parse_args(words)
    rounds, steps = (1, 10) if given.quick else (4, 100)
    attention, ffn = sorted(os.sched_getaffinity(0))[-2:]
    console = Console(width=190)
    layers = None if given.quick else LAYERS
    checkpoints = checkpoint.models(MODELS, tiny=given.quick, layers=layers)
    model = checkpoints[0].name.rpartition("-")[0]
    with Progress(console=console, refresh_per_second=2) as progress, ExitStack() as stack:
        engines = [
            stack.enter_context(Engine(checkpoints, two_devices(attention, ffn, lanes, loop)))
            for loop in LOOPS
            for lanes in (1, 2)
        ]
        arms = [
            arm(engine, model, batch, steps if batch == 1 else max(5, steps // 4))
            for batch in (1, 8)
            for engine in engines
        ]
        take_turns([arm.case for arm in arms], rounds, progress)
    if not given.quick:
        recorder = record(arms)
        recorder.write(given.results) if given.results else recorder.write()
        plot(arms, (given.results or IMAGES) / "ablation.svg")
    console.print(table(arms))
    for batch in (1, 8):
        parts = split([arm for arm in arms if arm.case.batch == batch])
        console.print(
            f"batch {batch}: both gain {parts.both:.2f}x. No Python: {parts.no_python:.2f}x with "
            f"one lane, {parts.no_python_with_overlap:.2f}x with two. Overlap: "
            f"{parts.overlap:.2f}x under the host loop, {parts.overlap_without_python:.2f}x under "
            "the resident loop"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
