"""The plot of one run or several: the share of requests, or of gaps, that took no longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from crosspool.bench.record import RequestRecord
from crosspool.bench.result import BenchResult
from crosspool.observability.plots import new_figure, save_figure

_MOST_LINES = 8
_STYLES = ("-", "--", ":", "-.")


def plot_results(results: Mapping[str, BenchResult], path: Path) -> None:
    """Plots the distributions of TTFT, TBT and E2E: by model for one result, and one line for each
    of several."""
    lines: dict[str, Sequence[RequestRecord]] = {}
    if len(results) == 1:
        (result,) = results.values()
        often = sorted(result.models, key=lambda name: -result.models[name].complete)
        for name in often[:_MOST_LINES]:
            lines[name] = [record for record in result.requests if record.model == name]
        if len(often) > 1:
            lines["all"] = result.requests
    else:
        lines = {name: result.requests for name, result in results.items()}
    drawn = new_figure(3, 4.6)
    for number, (name, records) in enumerate(lines.items()):
        complete = [record for record in records if record.complete]
        columns = (
            [r.ttft for r in complete if r.ttft is not None],
            [gap for r in complete for gap in r.tbt],
            [r.e2e for r in complete if r.e2e is not None],
        )
        for axes, values in zip(drawn.axes, columns, strict=True):
            if values:
                ascending = 1000 * np.sort(values)
                shares = np.arange(1, len(values) + 1) / len(values)
                style = _STYLES[number % len(_STYLES)]
                axes.step(ascending, shares, style, where="post", linewidth=1.2, label=name)
    titles = ("Time to first token", "Time between tokens", "End to end")
    for axes, title in zip(drawn.axes, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("ms")
        axes.set_ylim(0, 1)
        axes.grid(True, linewidth=0.5, alpha=0.5)
        if axes.lines:
            axes.set_xscale("log")
            axes.legend(fontsize=8, loc="lower right")
    drawn.axes[0].set_ylabel("share")
    save_figure(drawn, path)
