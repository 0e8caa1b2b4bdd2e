"""Sections of docs/paper.md with what the paper's reviewers asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmark.paper_text import grid, machine, missing, recorded


def peaks(results: Path) -> str:
    rows = [
        row
        for row in recorded("azure_pool", results)
        if row["name"] == "peak_dispersion" and row["parameters"]["charge"] == "active"
    ]
    above = {
        row["parameters"]["trace"]: row["median"]
        for row in recorded("azure_pool", results)
        if row["name"] == "above" and row["parameters"]["charge"] == "active"
    }

    def at_least(values: Sequence[float], count: int) -> str:
        return f"{sum(values[count:]):.2%}"

    cells = [
        [
            row["parameters"]["trace"],
            f"{row['median']:.2f}",
            *(
                text
                for count in (3, 5)
                for text in (
                    at_least(row["together"], count),
                    at_least(row["independent"], count),
                )
            ),
            f"{above[row['parameters']['trace']]:.2%}",
        ]
        for row in rows
    ]
    return "\n\n".join(
        (
            "## How often peaks coincide",
            "The paper's reviewers asked for this. `python -m benchmark.azure_pool CONV.csv "
            "CODE.csv`: 30 models share the requests of the Azure traces of 2023 by OpenRouter's "
            "popularity. A model is at its peak while its KV demand is above its own P95. The "
            "dispersion is 1 when peaks meet by chance, and 30 when all models peak together.",
            grid(
                (
                    "trace",
                    "dispersion (simulated)",
                    *("3 or more at once (simulated)", "by chance (simulated)"),
                    *("5 or more at once (simulated)", "by chance (simulated)"),
                    "time above a budget of P99 (simulated)",
                ),
                cells,
            ),
            "All models' requests come from one trace, so its bursts reach all of them: the worst "
            "case for a common pool. With the conversations, peaks meet about as by chance; with "
            "code, which comes in bursts, they do not, and the budget must follow the trace.",
        )
    )


def contended(results: Path) -> str:
    parts = [
        "## The contended regime",
        "The paper's reviewers asked what happens to the tail as demand exceeds the pool. Load 1 "
        "is what the pool serves when its queues are never empty.",
    ]
    for name, command, what in (
        (
            "contended_azure",
            "python -m benchmark.contended --azure CONV.csv --promise worst_case",
            "A workload that was chosen before anything of it was measured: the lengths of the "
            "Azure conversation trace, divided so that 99 in a hundred requests fit into the "
            "models' context, with a target of three times the median time between tokens of an "
            "uncontended load.",
        ),
        (
            "contended",
            "python -m benchmark.contended",
            "The earlier workload, chosen after four others had missed the aim "
            "([results.md](results.md#the-contended-regime)).",
        ),
    ):
        rows = recorded(name, results)
        if not rows:
            parts.append(f"`{command}`. {what} {missing(name)}")
            continue
        given = rows[0]["parameters"]
        tbt, ttft = (
            [r for r in rows if r["name"] == key and r["parameters"]["promise"] == "worst_case"]
            for key in ("tbt", "ttft")
        )
        ratio = next(r for r in rows if r["name"] == "tbt_p99_ratio")
        cells = [
            [
                f"{one['parameters']['load']:g}",
                f"{1e3 * one['median']:.1f}, {1e3 * one['p99']:.1f}",
                f"{first['median']:.2f}, {first['p99']:.2f}",
                f"{first['refused']} of {first['offered']}",
                f"{first['failed']}",
                f"{first['promised_share']:.0%}",
            ]
            for one, first in zip(tbt, ttft, strict=True)
        ]
        by_round = f"{given['rounds']} rounds"
        parts += [
            f"`{command}`. {what} Target {given['tbt_target_ms']:g} ms, {by_round}.",
            grid(
                (
                    *("load", "TBT P50, P99, ms (measured)", "TTFT P50, P99, s (measured)"),
                    *("429 (measured)", "failed (measured)", "pool promised (measured)"),
                ),
                cells,
            ),
            f"P99 time between tokens at load {tbt[-1]['parameters']['load']:g} is "
            f"**{ratio['pooled']:.2f}** times that at {tbt[0]['parameters']['load']:g} (aim 1.25), "
            f"over all rounds; the median of the rounds' own ratios is {ratio['median']:.2f} "
            "(measured). " + machine(tbt),
        ]
    return "\n\n".join(parts)
