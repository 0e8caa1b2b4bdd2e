"""Log lines whose number others decide: of frames that cannot be read, for instance."""

from __future__ import annotations

import logging
import time


class BoundedLog:
    """Writes errors to ``log``, at most ``lines`` of them in ``seconds`` seconds. How many were
    left out is told with the next one that is written."""

    def __init__(self, log: logging.Logger, *, lines: int = 10, seconds: float = 10.0) -> None:
        self._log = log
        self._lines = lines
        self._seconds = seconds
        self._began = -seconds
        self._written = 0
        self._left_out = 0

    def error(self, text: str, *arguments: object, exc_info: bool = False) -> None:
        """Writes one line; with ``exc_info``, the current exception's traceback below it."""
        now = time.monotonic()
        if now - self._began >= self._seconds:
            self._began, self._written = now, 0
        if self._written >= self._lines:
            self._left_out += 1
            return
        self._written += 1
        if self._left_out:
            self._log.error("%d lines like the next one were left out", self._left_out)
            self._left_out = 0
        self._log.error(text, *arguments, exc_info=exc_info)
