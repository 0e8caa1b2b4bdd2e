"""Plots that commands write: SVG or PNG, and the same file for the same figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crosspool.config.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")


def check_suffix(path: Path) -> None:
    """Checks the name of a plot before anything is computed. Raises ConfigError."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot {path}: the name must end in .svg or .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"plot {path}: there is no folder {path.parent}")


def new_figure(columns: int, width: float) -> Figure:
    """Returns a figure of ``columns`` axes side by side, each ``width`` inches wide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # the same figures give the same file
    matplotlib.rcParams["svg.hashsalt"] = "crosspool"
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure, _ = pyplot.subplots(1, columns, figsize=(width * columns, 4.2))
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure and closes it. Raises ConfigError when the file cannot be written."""
    from matplotlib import pyplot

    figure.tight_layout()
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise ConfigError(f"plot {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
