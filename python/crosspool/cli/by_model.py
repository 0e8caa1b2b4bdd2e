"""Flags whose value is one for all models, or one for each: ``VALUE`` or ``NAME=VALUE,...``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from crosspool.config.errors import ConfigError

_T = TypeVar("_T")


def per_model(
    text: str,
    names: Sequence[str],
    flag: str,
    read: Callable[[str, str], _T],
    partial: bool = False,
) -> dict[str, _T]:
    """Reads ``VALUE`` for all models, or ``NAME=VALUE,NAME=VALUE``, which must name every model
    unless ``partial``. Raises ConfigError."""
    if "=" not in text:
        return {name: read(text, flag) for name in names}
    found: dict[str, _T] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        if name not in names:
            raise ConfigError(f"{flag} {part!r}: there is no model {name!r}, only {few(names)}")
        found[name] = read(value, f"{flag} {name}")
    missing = [name for name in names if name not in found]
    if missing and not partial:
        raise ConfigError(f"{flag}: {few(missing)} has no value; give every model one")
    return found


def few(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def rate(text: str, where: str) -> float:
    """Reads requests per second. Raises ConfigError that names ``where``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{where} {text!r}: must be a number of requests per second, 0 or more")
    return value
