"""Judges the HTTP front door of a server with the three bundled models.

    python -m benchmark.front_door hostile [--only WORDS ...]
    python -m benchmark.front_door fuzz [--requests 100000] [--seed N] [--schemathesis PYTHON]
    python -m benchmark.front_door ending

``hostile`` sends every hostile request while 20 streams over three models run. ``fuzz`` sends
mutated requests to every route and, where PYTHON is that of an environment with schemathesis, what
this makes of the server's descriptions. ``ending`` sends SIGTERM while the worst requests run.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time

from rich.console import Console

from benchmark import machine
from benchmark.front_door import ending, fuzz_program, hostile
from benchmark.front_door.fuzz import Tally
from benchmark.records import Recorder

CONSOLE = Console(soft_wrap=True, highlight=False)


def show(verdict: hostile.Verdict) -> None:
    """Print a row's verdict on two lines."""
    before, during, outcome = verdict.before, verdict.during, verdict.outcome
    fault = ", ".join(verdict.faults)
    CONSOLE.print(
        f"{'[red]FAIL[/]' if fault else '[green]ok[/]  '} {verdict.name:<50} "
        f"{outcome.status or '---'} {outcome.seconds:6.2f} s  "
        f"gap {during.gap:6.2f} s ({before.gap:.2f})  health {during.health:6.3f} s "
        f"({before.health:.3f})  lag {during.lag:.2f}  cpu http {verdict.http_cpu:.2f} s "
        f"scheduler {verdict.scheduler_cpu:.2f} s of {verdict.seconds:.1f}  "
        f"http {verdict.growth / 1e6:+6.0f} MB  "
        f"{fault}{' ' + ' '.join(verdict.lost) if verdict.lost else ''}"
        f"{'' if verdict.recovered else '; started anew'}"
    )
    CONSOLE.print(f"       {outcome.note[:160]!r}", style="dim", markup=False)


def run_hostile(only: list[str]) -> int:
    recorder = Recorder("front_door_hostile")
    try:
        verdicts = hostile.run(only, show, recorder)
    finally:
        if not only:
            CONSOLE.print(f"written to {recorder.write()}")
    failed = [verdict for verdict in verdicts if verdict.faults]
    CONSOLE.print(f"{len(verdicts)} rows, {len(failed)} failed")
    return 1 if failed else 0


def run_fuzz(seed: int, requests: int, python: str | None) -> int:
    CONSOLE.print(f"seed {seed}, {requests} requests")
    load1, cpu, began = machine.load1(), os.times(), time.monotonic()
    tally = fuzz_program.run(seed, requests, python)
    used, wall = os.times(), time.monotonic() - began
    show_tally(tally)
    recorder = Recorder("front_door_fuzz")
    recorder.add(
        "time to answer",
        tally.seconds,
        "s",
        parameters={"seed": seed, "requests": tally.requests, "schemathesis": python is not None},
        longest=max(tally.seconds),
        statuses={str(status): count for status, count in sorted(tally.statuses.items())},
        server_errors=tally.count("5xx"),
        hangs=tally.count("hang"),
        resets=tally.count("reset"),
        lost=tally.lost,
        unavailable=dict(tally.unavailable),
        memory_bytes=tally.memory,
        load1=load1,
        cpu_s=used.user + used.system - cpu.user - cpu.system,
        wall_s=wall,
    )
    CONSOLE.print(f"written to {recorder.write()} after {wall:.0f} s")
    return 1 if tally.faults else 0


def show_tally(tally: Tally) -> None:
    """Print counts, and every kind of fault with the smallest request that showed it."""
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(tally.statuses.items()))
    CONSOLE.print(f"{tally.requests} requests; statuses {statuses}")
    CONSOLE.print(
        f"5xx {tally.count('5xx')}, hangs {tally.count('hang')}, resets {tally.count('reset')}, "
        f"lost {tally.lost}; longest answer {max(tally.seconds, default=0):.1f} s"
    )
    for found in sorted(tally.faults.values(), key=lambda found: -found.count):
        case, answer = found.case, found.answer
        body = (case.body or b"")[:600].decode(errors="replace")
        CONSOLE.print(
            f"{found.count:5} x {answer.fault} {answer.status or ''} {case.method} "
            f"{case.path[:200]} {body!r} {dict(case.headers)}\n        {answer.note[:200]!r}",
            markup=False,
        )
    for line, count in tally.unavailable.most_common(30):
        CONSOLE.print(f"{count:5} x 503 {line}", markup=False)
    for line, count in tally.exceptions.most_common(30):
        CONSOLE.print(f"{count:5} x in the log: {line}", markup=False)
    for moment in (tally.memory[:1] + tally.memory[-1:]) if tally.memory else ():
        CONSOLE.print({title: f"{size / 1e6:.0f} MB" for title, size in moment.items()})


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.front_door",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    programs = parser.add_subparsers(dest="program", required=True)
    given = programs.add_parser("hostile", help="hostile requests beside running streams")
    given.add_argument("--only", nargs="*", default=[], help="parts of the names of rows")
    given = programs.add_parser("fuzz", help="fuzzed requests to every route")
    given.add_argument("--requests", type=int, default=100_000)
    given.add_argument("--seed", type=int, help="random unless given")
    given.add_argument(
        "--schemathesis",
        type=os.path.abspath,
        metavar="PYTHON",
        help="Python that has schemathesis",
    )
    programs.add_parser("ending", help="SIGTERM while the worst requests run")
    options = parser.parse_args()
    if options.program == "hostile":
        return run_hostile(options.only)
    if options.program == "ending":
        return ending.run(CONSOLE.print)
    seed = random.randrange(2**31) if options.seed is None else options.seed
    return run_fuzz(seed, options.requests, options.schemathesis)


if __name__ == "__main__":
    sys.exit(main())
