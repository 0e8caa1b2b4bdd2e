"""Messages of front ends that cannot be decoded: whose they are, and what is wrong with them.

SGLang's messages are msgpack arrays: the type's name, then its fields in order, the request's id
first. So the ids can be found in a message whose other fields have wrong types or are nested too
deep for any decoder.
"""

from __future__ import annotations

import contextlib
import re

from sglang.srt.managers import io_struct
from sglang.srt.sampling.sampling_params import SamplingParams

_MOST_ITEMS = 200_000
"""Number of values in a message that are looked at."""
_BATCH_FIELD = 3
"""Where a batch has its list of messages."""

_SIZES = {
    **{0xC0: (0, 0), 0xC2: (0, 0), 0xC3: (0, 0)},  # nil, false, true
    **{0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0)},  # bin
    **{0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)},  # ext
    **{0xCA: (0, 4), 0xCB: (0, 8)},  # float
    **{0xCC: (0, 1), 0xCD: (0, 2), 0xCE: (0, 4), 0xCF: (0, 8)},  # unsigned
    **{0xD0: (0, 1), 0xD1: (0, 2), 0xD2: (0, 4), 0xD3: (0, 8)},  # signed
    **{0xD4: (0, 2), 0xD5: (0, 3), 0xD6: (0, 5), 0xD7: (0, 9), 0xD8: (0, 17)},  # fixext
    **{0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)},  # str
    **{0xDC: (2, 0), 0xDD: (4, 0), 0xDE: (2, 0), 0xDF: (4, 0)},  # array, map
}
"""What follows the first byte of a value: number of bytes of its length, and of further bytes."""


class _Walk:
    """Reads a message from its beginning, value by value, without recursion. Raises ValueError
    where it ends too early, or has too many values or an unknown one."""

    def __init__(self, frame: bytes) -> None:
        self._frame = frame
        self._at = 0
        self._items = 0

    def next(self) -> str | int | None:
        """The next value: a string as it is, an array as the number of its elements, which are
        next; None for any other, which is skipped."""
        kind, size = self._head()
        if kind == "array":
            return size
        if kind == "str":
            return self._frame[self._at - size : self._at].decode()
        self.skip(size)
        return None

    def skip(self, count: int) -> None:
        """Skips ``count`` values with all that is in them."""
        while count > 0:
            kind, size = self._head()
            count += (size if kind != "str" else 0) - 1

    def _head(self) -> tuple[str, int]:
        """What the next value is, and its number of bytes if it is a string, otherwise of values in
        it. Goes to its end, or to the first value in it."""
        self._items += 1
        if self._at >= len(self._frame) or self._items > _MOST_ITEMS:
            raise ValueError("the message ends early or is too long")
        first = self._frame[self._at]
        self._at += 1
        if first <= 0x7F or first >= 0xE0:
            return "number", 0
        if first <= 0x8F:
            return "map", 2 * (first & 0x0F)
        if first <= 0x9F:
            return "array", first & 0x0F
        if first <= 0xBF:
            return "str", self._forward(first & 0x1F)
        if first not in _SIZES:
            raise ValueError("the message is no msgpack")
        length_bytes, more = _SIZES[first]
        start = self._at
        self._forward(length_bytes)
        size = int.from_bytes(self._frame[start : self._at], "big")
        if first >= 0xDE:
            return "map", 2 * size
        if first >= 0xDC:
            return "array", size
        self._forward(size + more)
        return ("str", size) if 0xD9 <= first <= 0xDB else ("other", 0)

    def _forward(self, count: int) -> int:
        self._at += count
        if self._at > len(self._frame):
            raise ValueError("the message ends early")
        return count


def rids(frame: bytes) -> list[str]:
    """The ids of the requests in ``frame``, as far as they can be read."""
    found: list[str] = []
    with contextlib.suppress(ValueError):  # UnicodeDecodeError is one, too
        _find(_Walk(frame), found)
    return found


def _find(walk: _Walk, found: list[str]) -> None:
    fields = walk.next()
    if not isinstance(fields, int) or not isinstance(walk.next(), str):
        return
    own = walk.next()
    if isinstance(own, str):
        found.append(own)
    elif isinstance(own, int):
        found += [rid for rid in (walk.next() for _ in range(own)) if isinstance(rid, str)]
    elif fields > _BATCH_FIELD:
        walk.skip(_BATCH_FIELD - 2)
        messages = walk.next()
        for _ in range(messages if isinstance(messages, int) else 0):
            inner, _name, rid = walk.next(), walk.next(), walk.next()
            if not isinstance(inner, int) or not isinstance(rid, str):
                return
            found.append(rid)
            walk.skip(inner - 2)


def reason(error: Exception) -> str:
    """Text for the client whose request could not be decoded; it names the field."""
    if isinstance(error, RecursionError):
        return "the request is nested too deep"
    what, _, place = str(error).partition(" - at ")
    return f"`{_field(place)}`: {what}" if _field(place) else f"the request cannot be read: {what}"


def _field(place: str) -> str:
    """Name of the field at msgspec's ``$[8][1]``; empty where it has none."""
    indices = [int(index) for index in re.findall(r"\[(\d+)\]", place)]
    if len(indices) > 2 and indices[0] == _BATCH_FIELD:
        del indices[:2]
    message = io_struct.TokenizedGenerateReqInput.__struct_fields__
    if not indices or not 0 < indices[0] <= len(message):
        return ""
    name = str(message[indices[0] - 1])  # the type's name is first
    params = SamplingParams.__struct_fields__
    if name == "sampling_params" and indices[1:] and indices[1] < len(params):
        return str(params[indices[1]])
    return name
