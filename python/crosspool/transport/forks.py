"""What the launcher and the fork server tell each other, over a socket that keeps messages whole.

Messages are JSON, typed by msgspec.
"""

from __future__ import annotations

import msgspec

MAX_MESSAGE_BYTES = 4096


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """Fork the process ``name``, the one with this number in its place, from 1 on."""

    name: str
    incarnation: int


class Forked(msgspec.Struct, frozen=True, kw_only=True):
    """The process ``name`` is there. It leads a process group and is the launcher's child."""

    name: str
    pid: int
