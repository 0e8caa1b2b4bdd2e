"""The plot of Figure 6: lines and markers tell the systems apart without colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosspool.observability.plots import new_figure, save_figure
from crosspool.planner.paper.figure6 import BINS, LABELS, MODELS, READ_OFF, SYSTEMS, Figure6

_LOOKS: dict[str, dict[str, Any]] = {
    "crosspool": {"marker": "o", "linestyle": "-", "color": "#1b6ca8"},
    "kvcached": {"marker": "s", "linestyle": "--", "color": "#c0542c"},
    "static": {"marker": "^", "linestyle": ":", "color": "#4d4d4d"},
}


def plot_figure6(figure: Figure6, path: Path) -> None:
    """Plots rates by context bin; hollow marks are read off the paper's figure."""
    drawn = new_figure(len(MODELS), 4.4)
    for axes, (model, name) in zip(drawn.axes, MODELS.items(), strict=True):
        for system in SYSTEMS:
            cells = [
                cell
                for cell in figure.cells
                if (cell.model, cell.system) == (model, system) and cell.rate > 0
            ]
            places = [_place(cell.low) for cell in cells]
            axes.plot(places, [cell.rate for cell in cells], label=LABELS[system], **_LOOKS[system])
            for cell in cells:
                if cell.served < 1:
                    text = f"{cell.served:.0%} of lengths"
                    at = (_place(cell.low), cell.rate)
                    up = 8 if system == "kvcached" else -14
                    axes.annotate(text, at, (4, up), textcoords="offset points", fontsize=7)
            paper = {
                _place(low << 10): rate
                for (of, low, other), rate in READ_OFF.items()
                if (of, other) == (model, system)
            }
            look = {**_LOOKS[system], "linestyle": "none", "markersize": 10}
            axes.plot(list(paper), list(paper.values()), fillstyle="none", **look)
        axes.set_yscale("log")
        axes.set_ylim(0.05, 60)
        axes.set_xticks(range(len(BINS)), [f"{low >> 10}-{high >> 10}K" for low, high in BINS])
        axes.set_xlim(-0.4, len(BINS) - 0.6)
        axes.set_title(f"{model}: {name}", fontsize=10)
        axes.grid(True, which="major", linewidth=0.4)
        axes.set_xlabel("context, tokens")
    drawn.axes[0].set_ylabel("requests/s")
    drawn.axes[0].legend(fontsize=8)
    drawn.suptitle(
        "Highest request rate by context on five 40 GB devices "
        "(large hollow: read off the paper's Figure 6)",
        fontsize=10,
    )
    save_figure(drawn, path)


def _place(low: int) -> int:
    return [edges[0] for edges in BINS].index(low)
