"""Measures our engine beside the engines that a user would run instead, on the same checkpoint.

    python -m benchmark.side_by_side [--peers NAME ...] [--rounds 2] [--quick]

The other engines are those that ``python -m benchmark.peers.install`` has installed. One after
another, each takes turns with ours:

- one model with two threads, at batch 1 and 8, and a prompt
- two models at once, which for llama.cpp and vLLM are two processes, with a core for each process
or
  with both cores shared
- one model on one core
- for kt-kernel, which has MoE layers only, the MoE layer on one core

Our engine has both pools on one device and is driven like the others, without HTTP and scheduler.
The benchmark needs 22 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmark import checkpoint, plots
from benchmark.decoding import Engine, one_device
from benchmark.peers.install import PEERS
from benchmark.peers.protocol import Contestant, ContestantError, Message
from benchmark.records import IMAGES, Recorder
from benchmark.turns import Case, Comparison, Measured, record, table, take_turns

CONTEXT = 256
PROMPT = 2048
OURS = "crosspool"
MOE_PEER = "kt"
PAIRED = ("llama", "vllm")
"""Engines of which two processes are measured at once."""
MOE_BATCHES = (1, 8, 64)
ONE = "one model, two threads"
TWO_PINNED = "two models, a core for each process"
TWO_SHARED = "two models, processes share both cores"
SINGLE = "one model, one core"
READ = "prompt of 2048 tokens"
MOE = "MoE layer, one core"
LIMITS = {
    ("openvino", ONE, 1): 0.55,
    ("llama", ONE, 1): 0.50,
    ("vllm", ONE, 1): 0.45,
    ("vllm", ONE, 8): 0.8,
    ("llama", TWO_PINNED, 1): 0.58,
    ("llama", TWO_SHARED, 1): 0.58,
    ("vllm", TWO_PINNED, 1): 0.55,
    ("vllm", TWO_SHARED, 1): 0.55,
    ("vllm", TWO_PINNED, 8): 0.85,
    ("vllm", TWO_SHARED, 8): 0.85,
    ("vllm", READ, 0): 1.0,
    ("kt", MOE, 1): 0.65,
    ("kt", MOE, 8): 0.75,
    ("kt", MOE, 64): 1.0,
}
"""Highest ratio that is good, by engine, case and batch."""


@dataclass(frozen=True)
class Plan:
    """Amount of what is measured."""

    rounds: int = 2
    steps: int = 80
    batched_steps: int = 25
    tiny: bool = False


QUICK = Plan(rounds=1, steps=10, batched_steps=5, tiny=True)


@dataclass
class Ours:
    """Our engine in both forms that are compared, loaded once."""

    both: Engine
    """Two models on all cores."""
    single: Engine
    """One model on one core."""


Take = Callable[[], Measured]


@dataclass(frozen=True)
class Pair:
    """One case of ours and the same case of a peer."""

    what: str
    ours: Case
    theirs: Case


@dataclass
class Match:
    """Pairs of cases of ours and of one peer that take turns."""

    peer: str
    model: str
    plan: Plan
    pairs: list[Pair] = field(default_factory=list)

    def decode(
        self, what: str, engine: Engine, peers: Sequence[Contestant], batch: int = 1
    ) -> None:
        """Add decode steps of as many models at once as there are ``peers``."""
        steps = self.plan.steps if batch == 1 else self.plan.batched_steps

        def ours() -> Measured:
            decoded = engine.decode(batch, CONTEXT, steps, len(peers))
            return Measured(decoded.all_ms, decoded.cpu_s, decoded.wall_s)

        def theirs() -> Measured:
            asked = steps
            while True:  # steps during which the other process read its prompts do not count
                for peer in peers:
                    peer.send({"do": "decode", "batch": batch, "context": CONTEXT, "steps": asked})
                measured = overlapping([peer.receive(300.0) for peer in peers])
                if 2 * len(measured.ms) >= steps * len(peers) or asked > 8 * steps:
                    return measured
                asked *= 2

        threads = len(engine.setup.cores)
        self._pair(
            what, ours, theirs, batch=batch, context=CONTEXT, threads=threads, models=len(peers)
        )

    def prefill(self, what: str, engine: Engine, peer: Contestant) -> None:
        def ours() -> Measured:
            start, cpu = time.perf_counter(), engine.cpu_seconds()
            ms = [1e3 * engine.prefill(PROMPT)]
            return Measured(ms, engine.cpu_seconds() - cpu, time.perf_counter() - start)

        def theirs() -> Measured:
            answer = peer.prefill(PROMPT, 1)
            return Measured(
                [1e3 * s for s in answer["seconds"]], answer["cpu_s"], sum(answer["seconds"])
            )

        threads = len(engine.setup.cores)
        self._pair(what, ours, theirs, batch=0, context=PROMPT, threads=threads)

    def moe(self, what: str, engine: Engine, peer: Contestant, batch: int) -> None:
        """Add the FFN part of a layer. Our time comes from the trace and includes norm and router,
        which the peer does not have."""
        layers = engine.specs[0].layers

        def ours() -> Measured:
            decoded = engine.decode(batch, 16, self.plan.batched_steps, 1, trace=True)
            ms = [step.ffn / layers / 1e3 for step in decoded.parts[0]]
            return Measured(ms, decoded.cpu_s, decoded.wall_s)

        def theirs() -> Measured:
            answer = peer.ask({"do": "moe", "batch": batch, "repeats": 200}, 300.0)
            ms = [us / 1e3 for us in answer["layer_us"]]
            return Measured(ms, answer["cpu_s"], sum(ms) / 1e3)

        self._pair(what, ours, theirs, batch=batch, context=0, threads=1)

    def _pair(
        self,
        what: str,
        ours: Take,
        theirs: Take,
        *,
        batch: int,
        context: int,
        threads: int,
        models: int = 1,
    ) -> None:
        def case(who: str, take: Take) -> Case:
            name = f"{who}: {what}" + (f", batch {batch}" if batch else "")
            return Case(name, take, self.model, batch, context, threads, models)

        self.pairs.append(
            Pair(what, case(f"{OURS} beside {self.peer}", ours), case(self.peer, theirs))
        )

    def play(self, progress: Progress, others: Sequence[Case] = ()) -> list[Comparison]:
        """Measures all pairs, and ``others`` in turns with them; returns the pairs' comparisons."""
        cases = [case for pair in self.pairs for case in (pair.theirs, pair.ours)] + [*others]
        take_turns(cases, self.plan.rounds, progress)
        comparisons = []
        for pair in self.pairs:
            limit = LIMITS.get((self.peer, pair.what, pair.ours.batch))
            comparisons += [Comparison(pair.theirs), Comparison(pair.ours, pair.theirs, limit)]
        return comparisons


def overlapping(answers: Sequence[Message]) -> Measured:
    """Return the steps that processes took while all of them decoded."""
    begin = max(answer["started_s"][0] for answer in answers)
    end = min(answer["started_s"][-1] + answer["step_ms"][-1] / 1e3 for answer in answers)
    ms = [
        ms
        for answer in answers
        for ms, started in zip(answer["step_ms"], answer["started_s"], strict=True)
        if begin <= started and started + ms / 1e3 <= end
    ]
    wall = max(sum(answer["step_ms"]) for answer in answers) / 1e3
    return Measured(ms, sum(answer["cpu_s"] for answer in answers), wall)


class Bench:
    def __init__(self, plan: Plan, ours: Ours, cores: Sequence[int], progress: Progress) -> None:
        self._plan = plan
        self._ours = ours
        self._cores = cores
        self._progress = progress
        self._checkpoints = checkpoint.models(2, tiny=plan.tiny)

    def matches(self, peer: str) -> list[Callable[[str], list[Comparison]]]:
        """What is played against one peer; each may raise ContestantError."""
        if peer == MOE_PEER:
            return [self._moe_layer]
        return [self._one, self._pinned, self._shared] if peer in PAIRED else [self._one]

    def _one(self, peer: str) -> list[Comparison]:
        with self._processes(peer, [self._cores]) as processes:
            match = self._match(peer)
            match.decode(ONE, self._ours.both, processes)
            match.decode(ONE, self._ours.both, processes, batch=8)
            match.prefill(READ, self._ours.both, processes[0])
            return match.play(self._progress)

    def _pinned(self, peer: str) -> list[Comparison]:
        with self._processes(peer, [[core] for core in self._cores]) as processes:
            match = self._match(peer)
            match.decode(TWO_PINNED, self._ours.both, processes)
            match.decode(TWO_PINNED, self._ours.both, processes, batch=8)
            match.decode(SINGLE, self._ours.single, processes[-1:])
            return match.play(self._progress)

    def _shared(self, peer: str) -> list[Comparison]:
        with self._processes(peer, [self._cores, self._cores]) as processes:
            match = self._match(peer)
            match.decode(TWO_SHARED, self._ours.both, processes)
            match.decode(TWO_SHARED, self._ours.both, processes, batch=8)
            return match.play(self._progress)

    def _moe_layer(self, peer: str) -> list[Comparison]:
        with self._processes(peer, [self._cores[-1:]]) as processes:
            match = self._match(peer)
            for batch in MOE_BATCHES:
                match.moe(MOE, self._ours.single, processes[0], batch)
            return match.play(self._progress)

    def _match(self, peer: str) -> Match:
        return Match(peer, self._checkpoints[0].name.rpartition("-")[0], self._plan)

    def _processes(self, peer: str, cores: Sequence[Sequence[int]]) -> Processes:
        task = f"loading {peer}"
        loading = self._progress.add_task(task, total=None)
        try:
            return Processes(peer, self._checkpoints, cores)
        finally:
            self._progress.remove_task(loading)


class Processes(list[Contestant]):
    """Processes of one peer, each with a checkpoint, some cores and a thread per core."""

    def __init__(
        self, peer: str, checkpoints: Sequence[Path], cores: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        with ExitStack() as stack:
            for number, (folder, own) in enumerate(zip(checkpoints, cores, strict=False)):
                process = stack.enter_context(PEERS[peer].start(number))
                self.append(process)
                process.load(folder, len(own), own)
            self._stack = stack.pop_all()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Plot our step over the peer's for each case, in bars by peer."""
    ratios: dict[str, dict[str, float]] = {}
    for comparison in comparisons:
        if comparison.ratio is not None and comparison.to is not None:
            peer, _, what = comparison.to.name.partition(": ")
            ratios.setdefault(what, {})[peer] = comparison.ratio
    peers = list(dict.fromkeys(peer for by_peer in ratios.values() for peer in by_peer))
    figure, (axis,) = plots.panels(["Our step over the other's"], 1, 0.5 + 0.42 * len(ratios))
    height = 0.8 / max(1, len(peers))
    for index, peer in enumerate(peers):
        rows = [(y, of[peer]) for y, of in enumerate(ratios.values()) if peer in of]
        axis.barh(
            [y + index * height for y, _ in rows],
            [ratio for _, ratio in rows],
            height,
            label=peer,
            color=plots.COLORS[index % len(plots.COLORS)],
        )
    axis.set_yticks([y + 0.4 - height / 2 for y in range(len(ratios))], list(ratios), fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.legend(fontsize=8)
    plots.save(figure, path)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.side_by_side", description=__doc__)
    parser.add_argument("--peers", nargs="+", metavar="NAME", choices=PEERS)
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a tiny model; records nothing"
    )
    parser.add_argument("--results", type=Path, help="folder of the records")
    given = parser.parse_args(words)
    peers = given.peers or [name for name, peer in PEERS.items() if peer.installed]
    if not peers:
        parser.error("no engine is installed: python -m benchmark.peers.install")
    cores = sorted(os.sched_getaffinity(0))[-2:]
    plan = QUICK if given.quick else Plan(rounds=given.rounds)
    console = Console(width=210)
    recorder = Recorder("side_by_side")
    comparisons: list[Comparison] = []
    failed: list[tuple[str, str]] = []
    with Progress(console=console, refresh_per_second=2) as progress, ExitStack() as stack:
        folders = checkpoint.models(2, tiny=plan.tiny)
        ours = Ours(
            stack.enter_context(Engine(folders, one_device(cores))),
            stack.enter_context(Engine(folders[:1], one_device(cores[-1:]))),
        )
        bench = Bench(plan, ours, cores, progress)
        for peer, match in ((name, one) for name in peers for one in bench.matches(name)):
            try:
                done = match(peer)
            except ContestantError as error:
                failed.append((peer, str(error)))
                continue
            for comparison in done:
                more: dict[str, Any] = {}
                if comparison.case.context == PROMPT:
                    more["tokens_per_s"] = 1e3 * PROMPT / comparison.case.median
                record(recorder, comparison, **more)
            comparisons += done
            console.print(table(f"Beside {peer}", done))
    if not given.quick:
        recorder.write(given.results) if given.results else recorder.write()
        plot(comparisons, (given.results or IMAGES) / "side_by_side.svg")
    console.print(table("Beside other engines", comparisons))
    for peer, why in failed:
        console.print(f"{peer} failed: {why}", style="red", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
