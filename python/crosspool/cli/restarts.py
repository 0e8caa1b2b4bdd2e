"""When a process that has died is started again, and when that is of no use any more."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

WINDOW_SECONDS = 60.0
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 2.0
"""Seconds between two starts that fail: they double from the first wait to the longest."""


@dataclass
class _Past:
    restarts: deque[float] = field(default_factory=deque)
    """When the process was started again, within the window."""
    failures: int = 0
    """Number of times in a row that it has died before it was ready."""


class Restarts:
    """Counts the deaths of processes, by their names.

    ``limit``: how often a process is started again within :data:`WINDOW_SECONDS`, and how many
    starts in a row may fail; 0: never is one started again. ``clock`` gives seconds that only
    grow."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._pasts: defaultdict[str, _Past] = defaultdict(_Past)

    def wait(self, name: str, *, was_ready: bool) -> float | None:
        """How long to wait, in seconds, before the process that has just died is started again;
        None: it has died too often. It is started at once if it ``was_ready``."""
        past, now = self._pasts[name], self._clock()
        while past.restarts and past.restarts[0] <= now - WINDOW_SECONDS:
            past.restarts.popleft()
        past.failures = 0 if was_ready else past.failures + 1
        if max(len(past.restarts), past.failures) >= self.limit:
            return None
        past.restarts.append(now)
        if past.failures == 0:
            return 0.0
        return min(_FIRST_WAIT * 2.0 ** (past.failures - 1), _LONGEST_WAIT)
