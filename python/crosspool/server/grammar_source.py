"""Bounds on the source text of a grammar, whichever library compiles it."""

from __future__ import annotations

import json
from typing import Any

from crosspool.scheduler.request import Grammar

MAX_SOURCE_CHARACTERS = 256 << 10
"""A longer grammar is refused before anything reads it."""
MAX_DEPTH = 128
"""Most levels of lists and objects in the JSON of a schema or structural tag. In xgrammar compiling
takes time that grows with the third power of the depth: 200 nested objects, which are 400 levels,
took 4 s."""
MAX_WHITESPACE = 16
"""Most whitespace characters between two tokens of JSON: enough for indentation, and a model that
would go on writing blanks until its tokens run out cannot."""
ANY_JSON = "$$ANY$$"
"""Source of a ``json_schema`` that allows any JSON value."""
TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def source_problem(grammar: Grammar) -> str | None:
    """What is wrong with the source before any compiler reads it."""
    if len(grammar.source) > MAX_SOURCE_CHARACTERS:
        return f"it is longer than {MAX_SOURCE_CHARACTERS} characters"
    try:
        grammar.source.encode()
    except UnicodeEncodeError as error:
        return f"it is no Unicode text: {error.reason} at position {error.start}"
    return None


def parse_json(source: str) -> Any:
    """Raises a ValueError that says why ``source`` cannot be read."""
    try:
        parsed = json.loads(source)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    depth, level = 0, [parsed]
    while level := [n for n in level if isinstance(n, dict | list)]:
        depth += 1
        level = [c for n in level for c in (n.values() if isinstance(n, dict) else n)]
    if depth > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    return parsed
