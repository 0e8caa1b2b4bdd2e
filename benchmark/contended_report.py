"""Reports a run of the contended regime: rows, ratios, records, a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmark import plots
from benchmark.client import Replay
from benchmark.pool_sampler import PoolSample, PoolSampler
from benchmark.records import Recorder
from benchmark.summary import quantile
from benchmark.usage import Usage, total

PROMISES = ("worst_case", "growth")


@dataclass(frozen=True)
class Phase:
    """One load on one server in one round."""

    promise: str
    load: float
    round: int
    replay: Replay
    samples: PoolSampler
    usage: Usage
    pauses: int
    """Times that a running request waited for more pages (growth only)."""

    @property
    def tbt(self) -> list[float]:
        return [gap for answer in self.replay.answers if answer.complete for gap in answer.tbt]


@dataclass(frozen=True)
class Row:
    """All rounds of one load under one promise policy."""

    promise: str
    load: float
    ttft: list[float]
    tbt: list[float]
    offered: int
    complete: int
    refused: int
    failures: list[str]
    retry_after: list[int]
    """Retry-After of each 429 that carried one, in seconds."""
    output_tokens_per_s: float
    promised_share: float
    """Mean share of the pool that is promised to running requests, while the load arrives."""
    written_share: float
    """Mean share of the pool that holds tokens, likewise."""
    running: int
    """Most requests that ran at once."""
    pauses: int
    client_cpu_share: float
    """CPU time of the client as a share of one core."""
    lateness: float
    """P99 of the seconds by which the client sent a request late."""
    usage: dict[str, Any]
    """Fields of the machine's use that every record has."""


def row(phases: Sequence[Phase]) -> Row:
    answers = [answer for phase in phases for answer in phase.replay.answers]
    complete = [answer for answer in answers if answer.complete]
    refused = [answer for answer in answers if answer.refused]
    wall = sum(phase.replay.seconds for phase in phases)
    client = sum(phase.replay.client_cpu_s for phase in phases)
    return Row(
        promise=phases[0].promise,
        load=phases[0].load,
        ttft=[answer.ttft for answer in complete],
        tbt=[gap for phase in phases for gap in phase.tbt],
        offered=len(answers),
        complete=len(complete),
        refused=len(refused),
        failures=[a.error or str(a.status) for a in answers if not a.complete and not a.refused],
        retry_after=[a.retry_after for a in refused if a.retry_after is not None],
        output_tokens_per_s=sum(len(a.tokens) for a in complete) / wall,
        promised_share=_mean_share(phases, lambda s: s.promised_bytes),
        written_share=_mean_share(phases, lambda s: s.mapped_bytes - s.cached_bytes),
        running=max(s.running for phase in phases for s in phase.samples.samples),
        pauses=sum(phase.pauses for phase in phases),
        client_cpu_share=client / wall,
        lateness=quantile([late for p in phases for late in p.replay.lateness], 0.99),
        usage=total([phase.usage for phase in phases]),
    )


def _mean_share(phases: Sequence[Phase], used: Callable[[PoolSample], int]) -> float:
    """Return the mean share of the pool that is ``used`` while a load arrives."""
    shares = []
    for phase in phases:
        samples = phase.samples.samples
        last = max(answer.request.arrival for answer in phase.replay.answers)
        shares += [
            used(s) / s.budget_bytes for s in samples if s.seconds <= samples[0].seconds + last
        ]
    return float(np.mean(shares))


@dataclass(frozen=True)
class Ratio:
    """Ratio of P99 time between tokens at the highest load to that at the lowest."""

    pooled: float
    """Ratio over all rounds together."""
    by_round: list[float]


def ratio(phases: Sequence[Phase], promise: str) -> Ratio:
    own = [phase for phase in phases if phase.promise == promise]
    low, high = (edge(phase.load for phase in own) for edge in (min, max))

    def between(some: Sequence[Phase]) -> float:
        lower, higher = (
            quantile([gap for phase in some if phase.load == load for gap in phase.tbt], 0.99)
            for load in (low, high)
        )
        return higher / lower

    rounds = sorted({phase.round for phase in own})
    return Ratio(between(own), [between([p for p in own if p.round == n]) for n in rounds])


def record(
    phases: Sequence[Phase],
    rows: Sequence[Row],
    ratios: dict[str, Ratio],
    name: str,
    constant: dict[str, Any],
) -> Recorder:
    recorder = Recorder(name)
    for promise, both in ratios.items():
        recorder.add(
            "tbt_p99_ratio",
            both.by_round,
            "1",
            parameters={"promise": promise, **constant},
            **total([phase.usage for phase in phases if phase.promise == promise]),
            pooled=both.pooled,
        )
    for r in rows:
        common: dict[str, Any] = {
            "parameters": {"load": r.load, "promise": r.promise, **constant},
            **r.usage,
        }
        recorder.add("tbt", r.tbt, "s", **common, p999=quantile(r.tbt, 0.999), longest=max(r.tbt))
        recorder.add(
            "ttft",
            r.ttft,
            "s",
            **common,
            offered=r.offered,
            complete=r.complete,
            refused=r.refused,
            failed=len(r.failures),
            retry_after_median=float(np.median(r.retry_after)) if r.retry_after else None,
            output_tokens_per_s=r.output_tokens_per_s,
            promised_share=r.promised_share,
            written_share=r.written_share,
            most_running=r.running,
            pauses=r.pauses,
            client_cpu_share=r.client_cpu_share,
            client_lateness_p99=r.lateness,
        )
    return recorder


def table(rows: Sequence[Row]) -> Table:
    made = Table(
        title="Offered load against the KV pool's capacity", title_justify="left", box=box.SIMPLE
    )
    made.add_column("promise", no_wrap=True)
    for title in (
        *("load", "TBT ms\nP50, P99", "TTFT s\nP50, P99", "whole\nanswers", "429", "failed"),
        *("tokens\nper s", "pool\npromised", "pool\nwritten", "most\nat once", "pauses"),
        *("client\nCPU", "others'\nCPU"),
    ):
        made.add_column(title, justify="right", no_wrap=True)
    for r in rows:
        tbt = [1e3 * quantile(r.tbt, q) for q in (0.5, 0.99)]
        ttft = [quantile(r.ttft, q) for q in (0.5, 0.99)]
        made.add_row(
            r.promise,
            f"{r.load:g}",
            f"{tbt[0]:.1f}, {tbt[1]:.1f}",
            f"{ttft[0]:.2f}, {ttft[1]:.2f}",
            f"{r.complete} of {r.offered}",
            f"{r.refused}",
            f"{len(r.failures)}",
            f"{r.output_tokens_per_s:.0f}",
            f"{r.promised_share:.0%}",
            f"{r.written_share:.0%}",
            f"{r.running}",
            f"{r.pauses}",
            f"{r.client_cpu_share:.0%}",
            f"{r.usage['other_cpu_share']:.0%}",
        )
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    figure, (tbt, ttft, refused, used) = plots.panels(
        (
            "Time between tokens, ms",
            "Time to first token, s",
            "Answered with 429, %",
            "KV pool, % of its bytes",
        )
    )
    for promise, color in zip(PROMISES, plots.COLORS, strict=False):
        own = [r for r in rows if r.promise == promise]
        if not own:
            continue
        loads = [r.load for r in own]
        label = promise.replace("_", " ")
        for q, style in ((0.5, "--"), (0.99, "-")):
            name = f"{label}, P{100 * q:g}"
            tbt.plot(loads, [1e3 * quantile(r.tbt, q) for r in own], style, color=color, label=name)
            ttft.plot(loads, [quantile(r.ttft, q) for r in own], style, color=color, label=name)
        shares = [100 * r.refused / r.offered for r in own]
        refused.plot(loads, shares, "-", color=color, label=label)
        used.plot(loads, [100 * r.promised_share for r in own], "-", color=color)
        used.plot(loads, [100 * r.written_share for r in own], ":", color=color)
    used.plot([], [], "-", color="black", label="promised")
    used.plot([], [], ":", color="black", label="written")
    for axis in (tbt, ttft, refused, used):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False)
        axis.set_xlabel("offered load, of the pool's capacity", fontsize=8)
    plots.save(figure, path)
