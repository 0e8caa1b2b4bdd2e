"""Kills one kind of process again and again under streams, and tells what the streams notice.

    python -m benchmark.chaos.kills [--quick] [--kills 20] [--placements two-devices ...]
        [--victims FFN ...] [--loops resident host] [--dtype bfloat16] [--large] [--seed 0]
        [--apart 0.3 1.5]

Every server runs the three bundled models, or two checkpoints of 1.7 billion parameters with
--large, of which --clients (20) streams read answers without a break. Each question has been asked
once before, alone and without kills. A process is killed at a random moment, --apart seconds after
everything is back from the kill before. What a new request waits for its first token counts as a
pause, too. Exit status 1 where an answer was lost or has other tokens, or log-probabilities that
differ by more than 0.001.

The record of each loop and kind of models is a file of its own. Rows of placements and processes
that a run leaves out stay in it. benchmark.chaos.kill_tables prints the tables of the records.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmark import checkpoint
from benchmark.chaos.campaign import PLACEMENTS, flags, judge, pools
from benchmark.chaos.faults import Fault, processes_titled
from benchmark.chaos.traffic import Traffic, questions
from benchmark.records import RESULTS, Recorder, read_rows, write_rows
from benchmark.server import TINY_MODELS, Server
from benchmark.summary import quantile
from benchmark.usage import Usage

CONSOLE = Console(width=150, soft_wrap=True, highlight=False)
_TOKENS = 150
_CALM_SECONDS = 10.0
_BACK_SECONDS = 60.0
"""Time that everything gets to be back after a kill."""
_MOMENTS = (0.3, 1.5)
_OTHERS = {
    "detokenizer": "crosspool::detokenizer",
    "scheduler": "crosspool::scheduler",
    "HTTP": "crosspool::http",
}
VICTIMS = ("attention", "FFN", "both", *_OTHERS)


@dataclass(frozen=True)
class Found:
    """What the streams of a server noticed of kills of one kind of process."""

    kills: int
    answers: int
    """Number of answers that ended after the first kill."""
    interrupted: int
    """Number of answers that were under way at a kill, each kill counted."""
    outcomes: Counter[str]
    logprob_difference: float
    pauses: list[float]
    """Longest pause of any stream for each kill, in seconds."""
    calm_pause: float
    """The longest pause of any stream while nothing was killed, in seconds."""
    problems: list[str]


def victims(placement: str) -> dict[str, list[str]]:
    """Return the titles of the processes of each kind: devices of attention ranks, of FFN ranks, of
    both, and the others."""
    kv, weights = pools(placement)
    devices = {
        "attention": [name for name in kv if name not in weights],
        "FFN": [name for name in weights if name not in kv],
        "both": [name for name in kv if name in weights],
    }
    titles = {kind: [f"crosspool::device {n}" for n in names] for kind, names in devices.items()}
    found = {kind: names for kind, names in titles.items() if names}
    return {**found, **{kind: [title] for kind, title in _OTHERS.items()}}


def large_models() -> list[str]:
    """Return the folders of two checkpoints of 1.7 billion parameters."""
    return [str(folder) for folder in checkpoint.models(2)]


class Killer:
    """Kills processes of ``server`` while ``clients`` streams are read."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self._server, self._moments = server, options.apart
        self._launcher = server.processes()["crosspool::launcher"]
        models = [model["name"] for model in server.status()["models"]]
        streams = [one for one in questions(models, options.tokens) if one.streams]
        seed = options.seed
        self._traffic = Traffic(server.url, streams, options.clients, seed, left_share=0.0)
        self._rng = random.Random(seed)
        self._killed: set[psutil.Process] = set()

    async def learn(self) -> None:
        """Ask every question without kills."""
        await self._traffic.learn()

    async def kill(self, titles: Sequence[str], kills: int, calm_seconds: float) -> Found:
        """Kill a process with one of ``titles`` so many times, and read all answers to their end.
        Raises RuntimeError where it is not there in time."""
        traffic = self._traffic
        traffic.outcomes.clear()
        reading = asyncio.create_task(traffic.run())
        faults: list[Fault] = []
        try:
            await asyncio.sleep(calm_seconds)
            for _ in range(kills):
                title = self._rng.choice(titles)
                await self._back(title)
                await asyncio.sleep(self._rng.uniform(*self._moments))
                if not (found := self._processes(title)):
                    raise RuntimeError(f"no {title} is there:\n{self._server.log[-6000:]}")
                process = found[0]
                process.kill()
                self._killed.add(process)
                name = "kill-http" if title == _OTHERS["HTTP"] else "kill"
                faults.append(Fault(name, title, process.pid, time.monotonic()))
            await self._back(faults[-1].process)
        finally:
            traffic.end()
            await reading
        (calm, *rows), problems = judge(traffic.outcomes, faults)
        outcomes = sum((row.outcomes for row in rows), Counter[str]())
        return Found(
            kills=len(faults),
            answers=outcomes.total(),
            interrupted=sum(row.requests for row in rows),
            outcomes=outcomes,
            logprob_difference=max((o.logprob_difference for o in traffic.outcomes), default=0.0),
            pauses=[pause for row in rows for pause in row.pauses],
            calm_pause=calm.worst,
            problems=problems,
        )

    def _processes(self, title: str) -> list[psutil.Process]:
        found = (process for _, process in processes_titled(self._launcher, title))
        return [process for process in found if process not in self._killed]

    async def _back(self, title: str) -> None:
        """Wait until a process with that title is there, and every device is."""
        deadline = time.monotonic() + _BACK_SECONDS
        while not await asyncio.to_thread(self._is_there, title):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not everything is back in time:\n{self._server.log[-2000:]}")
            await asyncio.sleep(0.05)

    def _is_there(self, title: str) -> bool:
        try:
            return (
                bool(self._processes(title))
                and self._server.request("GET", "/health?strict=1")[0] == 200
            )
        except OSError:
            return False


def measure(
    placement: str, loop: str, options: argparse.Namespace
) -> Iterator[tuple[str, Found, Usage]]:
    """Yield what the kills of each kind of process came to, and what the measurement took."""
    wanted = {k: t for k, t in victims(placement).items() if k in options.victims}
    if not wanted:
        return
    words = flags(placement, loop, options.dtype, "512MiB" if options.large else "64MiB")
    with Server(words, large_models() if options.large else TINY_MODELS, 600.0) as server:
        killer = Killer(server, options)
        with asyncio.Runner() as runner:
            runner.run(killer.learn())
            for kind, titles in wanted.items():
                with Usage(server) as usage:
                    found = runner.run(killer.kill(titles, options.kills, options.calm_seconds))
                yield kind, found, usage


def table() -> Table:
    made = Table("placement", "loop", "killed", "kills", "answers", "interrupted", "cut", "failed")
    made.add_column("other tokens", justify="right")
    made.add_column("log-probabilities off by", justify="right")
    for name in ("longest pause: median", "worst", "without kills"):
        made.add_column(name, justify="right")
    return made


def row(placement: str, loop: str, kind: str, found: Found) -> list[str]:
    counts = [found.kills, found.answers, found.interrupted]
    counts += [found.outcomes[name] for name in ("cut", "failed", "wrong")]
    pauses = (quantile(found.pauses, 0.5), max(found.pauses), found.calm_pause)
    seconds = [f"{value:.2f} s" for value in pauses]
    return [
        *[placement, loop, kind, *map(str, counts)],
        *[f"{found.logprob_difference:.2g}", *seconds],
    ]


def record(
    recorder: Recorder, kind: str, found: Found, parameters: dict[str, Any], usage: Usage
) -> None:
    """Add a row for the kills of one kind of process."""
    recorder.add(
        f"longest pause, {kind} killed",
        found.pauses,
        "s",
        parameters=parameters,
        worst=max(found.pauses),
        without_kills=found.calm_pause,
        answers=found.answers,
        interrupted=found.interrupted,
        outcomes=dict(found.outcomes),
        logprob_difference=found.logprob_difference,
        load1=usage.load1,
        cpu_s=usage.cpu_s,
        wall_s=usage.wall_s,
    )


def merged(
    recorded: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows of both: one that was measured takes the place of the recorded one of the
    same placement and process."""
    rows = {(row["parameters"]["placement"], row["name"]): row for row in [*recorded, *measured]}
    return list(rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.chaos.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20, help="of each kind and server")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    loops = ("resident", "host")
    parser.add_argument("--loops", nargs="+", choices=loops, default=list(loops))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--large", action="store_true", help="two checkpoints of 1.7 billion parameters instead"
    )
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=_TOKENS, help="of a long answer")
    parser.add_argument("--calm-seconds", type=float, default=_CALM_SECONDS)
    parser.add_argument(
        "--apart",
        nargs=2,
        type=float,
        default=_MOMENTS,
        metavar=("FROM", "TO"),
        help="seconds between the moment when everything is back and the next kill",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="3 kills, which are not recorded")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.calm_seconds = 3, 3.0
    models = "large" if options.large else "bundled"
    recorders = {loop: Recorder(f"kills_{models}_{loop}") for loop in options.loops}
    made, problems = table(), 0
    for placement in options.placements:
        for loop in options.loops:
            for kind, found, usage in measure(placement, loop, options):
                made.add_row(*(cells := row(placement, loop, kind, found)))
                CONSOLE.print("  ".join(cells))
                for problem in found.problems[:5]:
                    CONSOLE.print(problem[:2000], style="red", markup=False)
                problems += len(found.problems)
                parameters = {
                    "placement": placement,
                    "loop": loop,
                    "dtype": options.dtype,
                    "clients": options.clients,
                    "tokens": options.tokens,
                    "seed": options.seed,
                    "apart_s": list(options.apart),
                }
                record(recorders[loop], kind, found, parameters, usage)
    CONSOLE.print(made)
    for recorder in [] if options.quick else recorders.values():
        path = RESULTS / f"{recorder.benchmark}.jsonl"
        write_rows(path, merged(read_rows(path) if path.is_file() else [], recorder.rows))
        CONSOLE.print(f"written to {path}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
