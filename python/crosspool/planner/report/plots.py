"""The plot of a plan, as SVG or PNG; hatches tell its bars apart without colour."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crosspool.config.sizes import format_size
from crosspool.observability.plots import new_figure, save_figure
from crosspool.planner.report.tables import SYSTEM_NAMES
from crosspool.planner.result import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HATCHES = {"static": "///", "monolithic": "...", "crosspool": ""}
_GIB = 1 << 30


def plot_plan(plan: Plan, path: Path) -> None:
    """Plots demand with the budget, and the rates that the same devices sustain in three ways."""
    drawn = new_figure(2, 5.4)
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
    save_figure(drawn, path)


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
