"""Makes plots of one style: SVG, legible on a page of documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#1f6fb4", "#d1601f", "#3a923a", "#7a52a1", "#8c8c8c")


def panels(titles: Sequence[str], columns: int = 2, height: float = 2.8) -> tuple[Figure, Any]:
    """Return a figure with one panel per title, and the panels as a list of Axes."""
    rows = -(-len(titles) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.4 * columns, height * rows), layout="constrained", squeeze=False
    )
    axes = list(grid.flat)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10, loc="left")
        plain(axis)
    for unused in axes[len(titles) :]:
        unused.remove()
    return figure, axes[: len(titles)]


def plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, axis="y", linewidth=0.5, alpha=0.5)
    axis.tick_params(labelsize=8)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG whose bytes depend on the plotted figures alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "crosspool", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
