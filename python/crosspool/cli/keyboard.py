"""Keys of a terminal, one at a time and without Enter."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from types import TracebackType

_SEQUENCES = {
    b"[A": "up",
    b"OA": "up",
    b"[B": "down",
    b"OB": "down",
    b"[5~": "page up",
    b"[6~": "page down",
    b"[H": "home",
    b"OH": "home",
    b"[1~": "home",
    b"[F": "end",
    b"OF": "end",
    b"[4~": "end",
}
"""What terminals send after an escape, and the names of these keys."""
_ESCAPE = b"\x1b"
_REST_SECONDS = 0.05
"""Time that the rest of a sequence has to come."""


class Keyboard:
    """Reads the keys of the standard input, a terminal; within the ``with``, what is typed is not
    shown. Ctrl-C still raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()

    def __enter__(self) -> Keyboard:
        self._before = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def read(self, timeout: float) -> str | None:
        """The next key: its character, or a name such as ``up``; None when none comes within
        ``timeout`` seconds, and for keys that have no name here. A terminal that has gone is
        ``q``."""
        if not self._is_readable(timeout):
            return None
        first = os.read(self._fd, 1)
        if not first:
            return "q"
        if first != _ESCAPE:
            return first.decode(errors="replace")
        rest = b""
        while len(rest) < 8 and self._is_readable(_REST_SECONDS):
            rest += os.read(self._fd, 1)
            if rest in _SEQUENCES:
                return _SEQUENCES[rest]
            if rest not in (b"[", b"O") and not rest[-1:].isdigit() and rest[-1:] != b";":
                return None
        return None if rest else "escape"

    def _is_readable(self, timeout: float) -> bool:
        return bool(select.select([self._fd], [], [], timeout)[0])
