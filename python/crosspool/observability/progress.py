"""How far loading has come: a progress bar where somebody watches, and one line in the log."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from crosspool.config.sizes import format_size

log = logging.getLogger(__name__)

tqdm.monitor_interval = 0
"""No thread looks after bars: a process that loads weights and forks must not have one."""

Progress = Callable[[int], None]
"""Takes the bytes, or other units, done since the last call (``tqdm.update``)."""


@dataclass
class Loading:
    """What :func:`loading` measures."""

    progress: Progress
    say: Callable[[str], None]
    """Shows beside the bar what is being loaded."""
    notes: list[str] = field(default_factory=list)
    """Further parts of the line in the log."""


@contextlib.contextmanager
def loading(device: str, what: str, total: int, unit: str = "B") -> Iterator[Loading]:
    """Shows a progress bar on a terminal, and logs size and time of ``what`` at the end.

    ``total``: bytes, or what else ``unit`` names, that the calls of ``progress`` add up to."""
    began = time.monotonic()
    with tqdm(
        total=total,
        desc=f"{device}: {what}",
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        leave=False,
        disable=None,
    ) as bar:
        loading = Loading(bar.update, bar.set_postfix_str)
        yield loading
    size = format_size(total) if unit == "B" else f"{total} {unit}"
    seconds = time.monotonic() - began
    log.info("%s: %s", what, ", ".join([f"{size} in {seconds:.1f} s", *loading.notes]))
