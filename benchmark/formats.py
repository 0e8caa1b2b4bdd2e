"""Measures quantised models beside llama.cpp on the same GGUF files, beside the bfloat16 model that
they were made from, and beside the time to read their bytes.

    python -m benchmark.formats [--types Q4_K_M Q8_0 Q4_0] [--pairs Q4_K_M] [--rounds 3] [--quick]

llama.cpp itself quantises the benchmark's checkpoint (``python -m benchmark.peers.install llama``).
For each type there are decode steps at batch 1 and 8 and a prompt of 2,048 tokens, on two threads
and in turns. Both programs get the file's path and nothing else of it. Of the types that
``--pairs`` names, two models decode at once, beside two processes of llama.cpp. Each type has a
file of records for each kind of processor.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from statistics import fmean

from crosspool.kernels.isa import default_isa
from rich.console import Console
from rich.progress import Progress

from benchmark import checkpoint, floors
from benchmark.decoding import Engine, one_device
from benchmark.peers import gguf_file
from benchmark.peers.install import PEERS
from benchmark.peers.llama_peer import gguf_path
from benchmark.peers.protocol import Contestant, random_ids
from benchmark.programs import Stopwatch
from benchmark.records import ROOT, Recorder
from benchmark.side_by_side import (
    CONTEXT,
    QUICK,
    TWO_PINNED,
    TWO_SHARED,
    Match,
    Plan,
    Processes,
)
from benchmark.turns import Case, Comparison, Measured, record, table

LIMITS = {
    ("Q4_K_M", 1): 1.0,
    ("Q4_K_M", 8): 1.0,
    ("Q8_0", 1): 0.95,
    ("Q8_0", 8): 0.95,
}
"""Highest ratio to llama.cpp that is good, by type and batch."""
PAIR_LIMIT = 0.6
"""Highest ratio that is good where two models decode at once."""
BFLOAT16 = "bfloat16"
PROMPTS, TOKENS = 20, 32


def quantized(kind: str, *, tiny: bool) -> Path:
    """Returns the benchmark's checkpoint as a GGUF file of a type; makes it if it is not there."""
    (folder,) = checkpoint.models(1, tiny=tiny)
    return quantized_file(folder, kind)


def quantized_file(folder: Path, kind: str) -> Path:
    """Returns a checkpoint as a GGUF file of a type; has llama.cpp make it if it is not there."""
    path = folder.with_name(f"{folder.name}-{kind}.gguf")
    if path.is_file():
        return path
    source = gguf_path(folder)
    if not source.is_file():
        gguf_file.convert(folder, source)
    command = [str(PEERS["llama"].python), "-m", "benchmark.peers.gguf_quantize"]
    subprocess.run([*command, str(source), str(path), kind], cwd=ROOT, check=True)
    return path


class Bench:
    """Measures one type at a time."""

    def __init__(
        self, plan: Plan, cores: Sequence[int], progress: Progress, recorder: Recorder
    ) -> None:
        self._plan = plan
        self._recorder = recorder
        self._cores = cores
        self._progress = progress

    def type(self, kind: str) -> list[Comparison]:
        """Compares a type with llama.cpp, with bfloat16 and with the floor."""
        path = quantized(kind, tiny=self._plan.tiny)
        folders = checkpoint.models(1, tiny=self._plan.tiny)
        with ExitStack() as stack:
            ours = stack.enter_context(Engine([path], one_device(self._cores)))
            plain = stack.enter_context(Engine(folders, one_device(self._cores)))
            theirs = stack.enter_context(
                Processes("llama", [path.with_suffix("")], [list(self._cores)])
            )
            match = Match("llama", path.stem, self._plan)
            for batch in (1, 8):
                match.decode(kind, ours, theirs, batch=batch)
            match.prefill(f"{kind}, prompt of 2048 tokens", ours, theirs[0])
            self._agreement(kind, ours, theirs[0])
            extra = [self._plain(plain, batch) for batch in (1, 8)]
            extra += [self._floor(kind, ours, batch) for batch in (1, 8)]
            compared = match.play(self._progress, extra)
        of_batch = {pair.ours.batch: pair.ours for pair in match.pairs}
        found = []
        for one in compared:
            limit = LIMITS.get((kind, one.case.batch)) if one.to is not None else None
            found.append(Comparison(one.case, one.to, limit))
        for case in extra:
            found.append(Comparison(case))
            found.append(Comparison(of_batch[case.batch], case))
        return found

    def pair(self, kind: str) -> list[Comparison]:
        """Compares two models of a type at once with two processes of llama.cpp, which have a core
        each or share both."""
        paths = [
            quantized_file(folder, kind) for folder in checkpoint.models(2, tiny=self._plan.tiny)
        ]
        each, shared = [[core] for core in self._cores], [self._cores] * 2
        found = list[Comparison]()
        with Engine(paths, one_device(self._cores)) as ours:
            for what, cores in ((TWO_PINNED, each), (TWO_SHARED, shared)):
                with Processes("llama", [path.with_suffix("") for path in paths], cores) as theirs:
                    match = Match("llama", paths[0].stem, self._plan)
                    match.decode(f"{kind}, {what}", ours, theirs)
                    compared = match.play(self._progress)
                limits = (PAIR_LIMIT if one.to is not None else None for one in compared)
                found += [
                    Comparison(one.case, one.to, limit)
                    for one, limit in zip(compared, limits, strict=True)
                ]
        return found

    def _agreement(self, kind: str, ours: Engine, theirs: Contestant) -> None:
        """Records how many greedy tokens are llama.cpp's, of which activations are rounded to 8
        bits: of every prompt's, those before the first that differs."""
        watch, shares = Stopwatch(), []
        for seed in range(PROMPTS):
            prompt = random_ids(ours.specs[0].vocab, CONTEXT // 4, seed)
            asked = {"do": "tokens", "prompt": prompt, "steps": TOKENS}
            pairs = zip(
                theirs.ask(asked, 300.0)["tokens"], ours.tokens(prompt, TOKENS), strict=True
            )
            shares.append(
                sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / TOKENS
            )
        name = f"greedy tokens of {kind} that are llama.cpp's, before the first other one"
        self._progress.console.print(f"{name}: {fmean(shares):.0%}")
        self._recorder.add(
            name,
            shares,
            "share",
            parameters={"prompts": PROMPTS, "tokens": TOKENS},
            mean=fmean(shares),
            **watch.read(),
        )

    def _plain(self, engine: Engine, batch: int) -> Case:
        steps = self._plan.steps if batch == 1 else self._plan.batched_steps

        def take() -> Measured:
            decoded = engine.decode(batch, CONTEXT, steps)
            return Measured(decoded.all_ms, decoded.cpu_s, decoded.wall_s)

        return self._case(f"{BFLOAT16}, batch {batch}", batch, take)

    def _floor(self, kind: str, engine: Engine, batch: int) -> Case:
        def take() -> Measured:
            start = time.perf_counter()
            spec = engine.specs[0]
            ms = [1e3 * s for s in floors.step_seconds(self._cores, spec, batch, CONTEXT)]
            wall = time.perf_counter() - start
            return Measured(ms, len(self._cores) * wall, wall)

        return self._case(f"floor of {kind}, batch {batch}", batch, take)

    def _case(self, name: str, batch: int, take: Callable[[], Measured]) -> Case:
        return Case(name, take, "moe-1.7b", batch, CONTEXT, len(self._cores))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.formats", description=__doc__)
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=["Q4_K_M", "Q8_0", "Q4_0"])
    parser.add_argument("--pairs", nargs="*", metavar="TYPE", default=["Q4_K_M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a tiny model; records nothing"
    )
    given = parser.parse_args(words)
    if not PEERS["llama"].installed:
        parser.error("llama.cpp is not installed: python -m benchmark.peers.install llama")
    plan = QUICK if given.quick else Plan(rounds=given.rounds)
    cores = sorted(os.sched_getaffinity(0))[-2:]
    console = Console(width=200)
    takes = [(kind, kind, Bench.type) for kind in given.types]
    takes += [(kind, f"{kind}_two_models", Bench.pair) for kind in given.pairs]
    with Progress(console=console, refresh_per_second=2) as progress:
        for kind, name, take in takes:
            recorder = Recorder(f"formats_{default_isa()}_{name.lower()}")
            comparisons = take(Bench(plan, cores, progress, recorder), kind)
            for comparison in comparisons:
                record(recorder, comparison)
            console.print(table(kind, comparisons))
            if not given.quick:
                recorder.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
