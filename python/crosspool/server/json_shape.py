"""How large the JSON of a body would be in memory, told from its bytes alone.

A decoded body takes up to a hundred times the memory of its bytes, and deep nesting ends recursive
code. So both are bounded before anything is decoded.
"""

from __future__ import annotations

_NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_OPENING = frozenset(b"{[")


def problem(body: bytes, most_values: int, most_depth: int, most_costly: int) -> str | None:
    """What is too large in the JSON ``body``; None where nothing is. Says nothing about whether
    it is valid. An empty object or list counts as two values. Strings, keys included, objects and
    lists may be ``most_costly``: each takes ten times as long to decode as a number."""
    containers, quotes = body.count(b"{") + body.count(b"["), body.count(b'"')
    if (
        containers <= most_depth
        and containers + body.count(b",") < most_values
        and containers + quotes // 2 <= most_costly
    ):
        return None
    too_many = f"the body has more than {most_values} JSON values (max_json_values)"
    too_costly = (
        f"the body has more than {most_costly} JSON strings, objects and lists "
        "(a quarter of max_json_values)"
    )
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = (body.count(b'"') + 1) // 2
    if strings > 2 * most_values:  # a value has two strings at most: its key and itself
        return too_many
    if strings > most_costly:
        return too_costly
    outside = b"".join(body.split(b'"')[::2])
    containers = outside.count(b"{") + outside.count(b"[")
    if containers + outside.count(b",") >= most_values:
        return too_many
    if containers + strings > most_costly:
        return too_costly
    depth = 0
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in _OPENING else -1
        if depth > most_depth:
            return (
                f"the body has more than {most_depth} JSON objects and lists within each other "
                "(max_json_depth)"
            )
    return None
