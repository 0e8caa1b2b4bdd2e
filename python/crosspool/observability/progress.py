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

Progress = Callable[[int], None]
"""Takes the bytes done since the last call (``tqdm.update``)."""


@dataclass
class Loading:
    """What :func:`loading` measures."""

    progress: Progress
    notes: list[str] = field(default_factory=list)
    """Further parts of the line in the log."""


@contextlib.contextmanager
def loading(device: str, what: str, total: int) -> Iterator[Loading]:
    """Shows a progress bar on a terminal, and logs size and time of ``what`` at the end.

    ``total``: bytes that the calls of ``progress`` add up to."""
    began = time.monotonic()
    with tqdm(
        total=total,
        desc=f"{device}: {what}",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None,
    ) as bar:
        loading = Loading(bar.update)
        yield loading
    size, seconds = format_size(total), time.monotonic() - began
    log.info("%s: %s", what, ", ".join([f"{size} in {seconds:.1f} s", *loading.notes]))
