"""Sizes in bytes as people write them: ``2GiB``, ``512MiB``, ``1.5GB``, ``4096``."""

from __future__ import annotations

import re

from crosspool.config.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?")
_FACTORS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def parse_size(text: str | int) -> int:
    """Returns the number of bytes, rounded down.

    ``KiB, MiB, GiB, TiB`` are powers of 1024, ``kB, MB, GB, TB`` of 1000; the ``B`` may be left
    out. Raises ValueError for anything else, for zero and for a fraction of a byte."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write 2GiB, 512MiB, 1.5GB or a number of bytes")
    unit = (match.group(2) or "").replace("K", "k")
    size = int(float(match.group(1)) * _FACTORS[unit]) if unit else int(float(match.group(1)))
    if size < 1:
        raise ValueError(f"{text!r} is no size: at least 1 byte")
    return size


def size_of(value: int | str, key: str) -> int:
    """Parses the size under ``key``; raises ConfigError that names it."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def format_size(size: float) -> str:
    """Returns ``size`` bytes in the binary unit that leaves one to four digits before the point."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def kv_sizes(token: int, request: int) -> str:
    """Returns what a request holds in the KV pool: bytes per token, and those of its recurrent
    state where the model has one."""
    return f"{format_size(token)} + {format_size(request)} each" if request else format_size(token)


def exact_size(size: int) -> str:
    """Returns ``size`` bytes as :func:`parse_size` reads them, in the largest binary unit of which
    they are a whole number: ``2MiB``, ``4097``."""
    for prefix in ("Ti", "Gi", "Mi", "Ki"):
        factor = _FACTORS[prefix.replace("K", "k")]
        if size and size % factor == 0:
            return f"{size // factor}{prefix}B"
    return str(size)
