"""The signals that come to a process which watches others."""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

_NEWS_BYTES = 4096


class Signals:
    """Counts the signals that ask to stop, and ends waits when one comes or a child ends.

    >>> signals = Signals()
    >>> with signals.caught():
    ...     while not signals.stops:
    ...         signals.wait([], 0.1)
    """

    def __init__(self) -> None:
        self.stops = 0
        """Number of SIGTERM and SIGINT that have come."""
        self._news: socket.socket
        """Readable when a signal has come, that of a child's end included."""

    def wait(self, tellers: Iterable[socket.socket], seconds: float) -> None:
        """Returns after ``seconds``, or before when a signal comes, a child ends or one of
        ``tellers`` is readable. To be called within :meth:`caught`."""
        readable, _, _ = select.select([self._news, *tellers], [], [], seconds)
        if self._news in readable:
            self._news.recv(_NEWS_BYTES)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Takes the signals in place of their former handlers, which are back afterwards."""

        def count(number: int, frame: FrameType | None) -> None:
            self.stops += 1

        def ignore(number: int, frame: FrameType | None) -> None:
            """Takes SIGCHLD, so that it comes to the wake-up descriptor."""

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        handlers = (count, count, ignore)
        before = [signal.signal(n, handler) for n, handler in zip(numbers, handlers, strict=True)]
        self._news, writer = socket.socketpair()
        self._news.setblocking(False)
        writer.setblocking(False)
        outer = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            with self._news, writer:
                try:
                    yield
                finally:
                    signal.set_wakeup_fd(outer)
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
