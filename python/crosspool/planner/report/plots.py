"""Plots of a plan and of the paper's Figure 6, as SVG or PNG; told apart by lines, markers and
hatches, so that they can be read without colour."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosspool.config.errors import ConfigError
from crosspool.config.sizes import format_size
from crosspool.planner.paper.figure6 import BINS, MODELS, READ_OFF, SYSTEMS, Figure6
from crosspool.planner.report.tables import SYSTEM_NAMES
from crosspool.planner.result import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
_LOOKS: dict[str, dict[str, Any]] = {
    "crosspool": {"marker": "o", "linestyle": "-", "color": "#1b6ca8"},
    "kvcached": {"marker": "s", "linestyle": "--", "color": "#c0542c"},
    "static": {"marker": "^", "linestyle": ":", "color": "#4d4d4d"},
}
_HATCHES = {"static": "///", "monolithic": "...", "crosspool": ""}
_LABELS = {"static": "static partition", "kvcached": "kvcached", "crosspool": "CrossPool"}
_GIB = 1 << 30


def check_suffix(path: Path) -> None:
    """Raises ConfigError, before anything is computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot {path}: the name must end in .svg or .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"plot {path}: there is no folder {path.parent}")


def plot_figure6(figure: Figure6, path: Path) -> None:
    """Rates by context bin; filled: ours, hollow: read off the paper's figure."""
    drawn = _new(len(MODELS), 4.4)
    for axes, (model, name) in zip(drawn.axes, MODELS.items(), strict=True):
        for system in SYSTEMS:
            cells = [
                cell
                for cell in figure.cells
                if (cell.model, cell.system) == (model, system) and cell.rate > 0
            ]
            places = [_place(cell.low) for cell in cells]
            axes.plot(
                places, [cell.rate for cell in cells], label=_LABELS[system], **_LOOKS[system]
            )
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
    _save(drawn, path)


def plot_plan(plan: Plan, path: Path) -> None:
    """Demand with the budget line, and what the same devices sustain under the three systems."""
    drawn = _new(2, 5.4)
    _draw_demand(drawn.axes[0], plan)
    axes = drawn.axes[1]
    for place, system in enumerate(plan.systems):
        axes.bar(
            place,
            system.sustained,
            hatch=_HATCHES[system.name],
            edgecolor="black",
            color="#c9d9e8",
            width=0.6,
        )
        text = f"{system.sustained:.3g}/s" if system.fits else "does not fit"
        axes.annotate(text, (place, system.sustained), ha="center", va="bottom", fontsize=9)
    axes.axhline(plan.rate, linestyle="--", color="black", linewidth=1, label="this traffic")
    axes.legend(fontsize=8)
    names = [SYSTEM_NAMES[system.name].replace(", ", ",\n") for system in plan.systems]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("requests/s sustained, by KV memory")
    axes.set_title(
        f"{plan.devices.count} device(s) of {format_size(plan.devices.bytes)}", fontsize=10
    )
    axes.margins(y=0.15)
    _save(drawn, path)


def _draw_demand(axes: Axes, plan: Plan) -> None:
    places = [point[0] for point in plan.curve]
    sizes = [point[1] / _GIB for point in plan.curve]
    axes.plot(places, sizes, color="#1b6ca8", linewidth=1, label="KV demand")
    name = f"P{100 * plan.quantile:g}"
    axes.axhline(
        plan.budget.pool_bytes / _GIB,
        color="black",
        linestyle="--",
        label=f"page budget ({name}): {format_size(plan.budget.pool_bytes)}",
    )
    axes.axhline(
        plan.budget.static_bytes / _GIB,
        color="black",
        linestyle=":",
        label=f"sum of own {name}: {format_size(plan.budget.static_bytes)}",
    )
    axes.set_xlabel("second of the trace" if plan.curve_over_time else "share of the time")
    axes.set_ylabel("GiB")
    axes.set_ylim(0, 1.45 * plan.budget.static_bytes / _GIB)
    axes.set_title("KV demand of all models", fontsize=10)
    axes.legend(fontsize=8)


def _place(low: int) -> int:
    return [edges[0] for edges in BINS].index(low)


def _new(columns: int, width: float) -> Figure:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # the same plan gives the same file
    matplotlib.rcParams["svg.hashsalt"] = "crosspool"
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure, _ = pyplot.subplots(1, columns, figsize=(width * columns, 4.2))
    return figure


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise ConfigError(f"plot {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
