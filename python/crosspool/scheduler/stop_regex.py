"""Regular expressions that end a request: bounded in what they cost, whatever a client writes."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

import regex

WINDOW = 4096
"""Characters at the end of the output in which a match has to begin."""
MOST_PATTERNS = 32
"""Patterns of one request, as in SGLang."""
_MOST_BYTES = 256
"""Bytes of one pattern, as in SGLang."""
_MOST_PARTS = 2048
"""Characters of one pattern when its counted repetitions are written out, which compiling does."""
_SECONDS = 0.005
"""Processor time that searches for one request may take at once."""
_SECONDS_PER_TOKEN = 0.0005
"""Processor time by which that grows again with each token."""

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
_OWN_SYNTAX = re.compile(r"(\\N\{[^}]*\}|\\.)|(\{)(?![0-9,])|\[:", re.DOTALL)
"""Escapes, which stay as they are, and what means something else to ``regex`` than to ``re``."""


class TooSlow(Exception):
    """Searching took longer than a request may take."""


@lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Raises ValueError, with a text for the client, for a pattern that cannot be used."""
    size = len(pattern.encode(errors="surrogatepass"))
    if size > _MOST_BYTES:
        raise ValueError(f"a stop_regex has {size} bytes; at most {_MOST_BYTES} are allowed")
    try:
        with warnings.catch_warnings(action="ignore"):
            parts = _parts(_parser.parse(pattern))
            if parts > _MOST_PARTS:
                raise ValueError(
                    f"with its repetitions written out it has {parts} characters; at most "
                    f"{_MOST_PARTS} are allowed"
                )
            return regex.compile(_OWN_SYNTAX.sub(_escaped, pattern), cache_pattern=False)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"the stop_regex {pattern!r} cannot be used: {error}") from None


def _escaped(found: re.Match[str]) -> str:
    if found[1] is not None:
        return found[1]
    return r"\{" if found[2] else r"[\:"


def _parts(tree: Any) -> int:
    """Number of characters, classes and references in ``tree``, as often as they are repeated."""
    if not isinstance(tree, _parser.SubPattern | list | tuple):
        return 0
    if isinstance(tree, tuple) and len(tree) == 2 and tree[0] in _REPEATS:
        least, most, inner = tree[1]
        times = least if most == _constants.MAXREPEAT else most
        return int(max(1, times)) * (1 + _parts(inner))
    return sum(1 if isinstance(part, int) else _parts(part) for part in tree)


class StopRegexes:
    """Looks for ``patterns`` in the output text of one request after each token, as ``re.search``
    would in the whole text; but a match has to begin in the last :data:`WINDOW` characters."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns
        self._text = ""
        self._start = 0
        """Place in ``_text`` before which no match may begin."""
        self._left = _SECONDS

    def feed(self, text: str) -> str | None:
        """Takes more of the output; returns the first pattern that is found, if any. The same match
        is not found again. Raises :class:`TooSlow`."""
        self._text += text
        self._start = max(self._start, len(self._text) - WINDOW)
        if self._start > 2 * WINDOW:  # what stays before it is there to be looked back at
            self._text = self._text[self._start - WINDOW :]
            self._start = WINDOW
        self._left = min(self._left + _SECONDS_PER_TOKEN, _SECONDS)
        for pattern in self._patterns:
            found = self._search(compile_pattern(pattern))
            if found is not None:
                self._start = found.end()
                return pattern
        return None

    def _search(self, compiled: regex.Pattern[str]) -> regex.Match[str] | None:
        while True:
            began = time.thread_time()
            try:
                return compiled.search(self._text, self._start, timeout=self._left)
            except TimeoutError:
                # Its clock counts all threads of the process, so there may be time left.
                pass
            finally:
                self._left -= time.thread_time() - began
            if self._left <= 0:
                raise TooSlow
