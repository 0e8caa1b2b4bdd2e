"""Kills, stops and slows the processes of a server at random under mixed traffic of the three
bundled models, and checks every answer against the one that was given without faults.

    python -m benchmark.chaos [--quick] [--minutes 15] [--every 3] [--seed N]
        [--kinds kill-device ...] [--placement tp] [--loop host]

Exit status 1 where an answer was lost or wrong, or where something of the machine was not given
back. A connection that is cut because its HTTP process was killed or stopped is no failure.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from rich.console import Console
from rich.table import Table

from benchmark import machine
from benchmark.chaos.campaign import CALM, PLACEMENTS, Plan, Verdict, run
from benchmark.chaos.faults import KINDS
from benchmark.records import Recorder

CONSOLE = Console(width=130, soft_wrap=True, highlight=False)
_SHOWN = 20
_OUTCOMES = ("ok", "left", "cut", "failed", "wrong", "inexact")


def show(verdict: Verdict) -> None:
    """Print a table of faults, what the server held before and after, and the problems."""
    table = Table(
        "fault", "count", "requests", "ended", "left", "cut", "failed", "wrong", "inexact"
    )
    table.add_column("longest pause: median", justify="right")
    table.add_column("worst", justify="right")
    for row in verdict.rows:
        counts = [row.outcomes[kind] for kind in _OUTCOMES]
        median = "" if row.kind == CALM else f"{row.median:.2f} s"
        cells = [row.faults, row.requests, *counts, median, f"{row.worst:.2f} s"]
        table.add_row(row.kind, *map(str, cells))
    CONSOLE.print(table)
    for name, held in (("before", verdict.before), ("after", verdict.after)):
        total = held.total
        CONSOLE.print(
            f"{name}: {total.memory >> 20} MiB in {len(held.processes)} processes, "
            f"{total.descriptors} descriptors, {total.threads} threads, "
            f"{len(held.folders)} files in runtime folders, "
            f"{len(held.shared)} objects in /dev/shm"
        )
    for problem in verdict.problems[:_SHOWN]:
        CONSOLE.print(problem[:2000], style="red", markup=False)
    if not verdict.problems:
        CONSOLE.print("nothing was lost, nothing was wrong, nothing is left", style="green")


def record(plan: Plan, verdict: Verdict, recorder: Recorder, **usage: float) -> None:
    """Add a row for each kind of fault."""
    parameters = {
        "seed": plan.seed,
        "seconds": plan.seconds,
        "every_s": plan.every,
        "placement": plan.placement,
        "loop": plan.loop,
        "dtype": plan.dtype,
        "clients": plan.clients,
    }
    for row in verdict.rows:
        if row.kind != CALM and row.pauses:
            recorder.add(
                f"longest pause, {row.kind}",
                row.pauses,
                "s",
                parameters=parameters,
                worst=row.worst,
                requests=row.requests,
                outcomes=dict(row.outcomes),
                load1=usage["load1"],
                cpu_s=usage["cpu_s"],
                wall_s=usage["wall_s"],
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="length of the faults")
    parser.add_argument("--every", type=float, default=3.0, help="mean seconds between two faults")
    parser.add_argument("--seed", type=int, help="random unless given")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--placement", choices=PLACEMENTS, default="one-device")
    parser.add_argument("--loop", choices=("resident", "host"), default="resident")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="20 seconds, which are not recorded")
    options = parser.parse_args()
    plan = Plan(
        seed=random.randrange(2**31) if options.seed is None else options.seed,
        seconds=20 if options.quick else 60 * options.minutes,
        every=options.every,
        kinds=options.kinds,
        placement=options.placement,
        loop=options.loop,
        dtype=options.dtype,
        clients=options.clients,
    )
    CONSOLE.print(f"seed {plan.seed}, {plan.placement}, {plan.loop} loop, {plan.dtype}")
    load1, cpu, began = machine.load1(), time.process_time(), time.monotonic()
    verdict = run(plan, lambda text: CONSOLE.print(f"{time.monotonic() - began:7.1f} s  {text}"))
    show(verdict)
    if not options.quick:
        recorder = Recorder("chaos")
        usage = {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - began}
        record(plan, verdict, recorder, load1=load1, **usage)
        CONSOLE.print(f"written to {recorder.write()}")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
