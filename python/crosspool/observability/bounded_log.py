"""Log lines whose number others decide: of frames that cannot be read, for instance."""

from __future__ import annotations

import logging
import time


class _Bound:
    """Counts lines, of which ``lines`` are let through in ``seconds`` seconds."""

    def __init__(self, lines: int, seconds: float) -> None:
        self._lines = lines
        self._seconds = seconds
        self._began = -seconds
        self._written = 0
        self._left_out = 0

    def take(self) -> int | None:
        """Returns how many lines were left out since the last one that was written; None where this
        one is left out, too."""
        now = time.monotonic()
        if now - self._began >= self._seconds:
            self._began, self._written = now, 0
        if self._written >= self._lines:
            self._left_out += 1
            return None
        self._written += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


class BoundedLog:
    """Writes errors to ``log``, at most ``lines`` of them in ``seconds`` seconds. How many were
    left out is told with the next one that is written."""

    def __init__(self, log: logging.Logger, *, lines: int = 10, seconds: float = 10.0) -> None:
        self._log = log
        self._bound = _Bound(lines, seconds)

    def error(self, text: str, *arguments: object, exc_info: bool = False) -> None:
        """Writes one line; with ``exc_info``, the current exception's traceback below it."""
        left_out = self._bound.take()
        if left_out is None:
            return
        if left_out:
            self._log.error("%d lines like the next one were left out", left_out)
        self._log.error(text, *arguments, exc_info=exc_info)


class BoundedWarnings(logging.Filter):
    """Has a logger of somebody else write at most ``lines`` warnings in ``seconds`` seconds. How
    many were left out is told with the next one that is written."""

    def __init__(self, *, lines: int = 10, seconds: float = 10.0) -> None:
        super().__init__()
        self._bound = _Bound(lines, seconds)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        left_out = self._bound.take()
        if left_out:
            record.msg = f"{record.msg} ({left_out} lines like this one were left out)"
        return left_out is not None
