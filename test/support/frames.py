"""Frames that no honest peer sends, made from valid ones and from nothing, by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

_MOST_BYTES = 4096
_MOST_DEPTH = 20_000


def _bytes(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    return rng.randbytes(rng.randrange(_MOST_BYTES))


def _flipped(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    frame = bytearray(rng.choice(valid))
    for _ in range(rng.randint(1, 8)):
        frame[rng.randrange(len(frame))] = rng.randrange(256)
    return bytes(frame)


def _cut(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    frame = rng.choice(valid)
    return frame[: rng.randrange(len(frame))]


def _spliced(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    one, other = rng.choice(valid), rng.choice(valid)
    return one[: rng.randrange(len(one))] + other[rng.randrange(len(other)) :]


def _deep(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    begin = rng.choice((b"", _cut(rng, valid)))
    return begin + rng.choice((b"\x91", b"\x81\xa1a")) * rng.randrange(_MOST_DEPTH) + b"\xc0"


def _claiming(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    """A container, string or extension that is far shorter than it says."""
    kind = rng.choice((0xC6, 0xC9, 0xDB, 0xDD, 0xDF))
    length = rng.choice((2**31, 2**32 - 1)).to_bytes(4, "big")
    return _cut(rng, valid) + bytes([kind]) + length + rng.randbytes(16)


def _value(rng: random.Random, depth: int = 0) -> object:
    kinds = 9 if depth < 3 else 7
    match rng.randrange(kinds):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2:
            return rng.choice((0, -1, 2**31, 2**63, 2**64 - 1, -(2**63), rng.randrange(100)))
        case 3:
            return rng.choice((0.0, 1.5, 1e308, float("nan"), float("inf")))
        case 4:
            return rng.choice(("", "x", "é" * 50, "\x00", "a" * rng.randrange(300)))
        case 5:
            return rng.randbytes(rng.randrange(20))
        case 6:
            return msgspec.msgpack.Ext(rng.randrange(-128, 128), rng.randbytes(rng.randrange(20)))
        case 7:
            return [_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {str(i): _value(rng, depth + 1) for i in range(rng.randrange(5))}


def _other_types(rng: random.Random, valid: Sequence[bytes]) -> bytes:
    """A valid frame of which some values are others."""
    message = msgspec.msgpack.decode(rng.choice(valid))
    keys = list(message) if isinstance(message, dict) else list(range(1, len(message)))
    for key in rng.sample(keys, rng.randint(1, min(3, len(keys)))):
        message[key] = _value(rng)
    return msgspec.msgpack.encode(message)


_MAKERS = (_bytes, _flipped, _cut, _spliced, _deep, _claiming, _other_types, _other_types)


def hostile(rng: random.Random, valid: Sequence[bytes]) -> list[bytes]:
    """The parts of one message; most have one part. ``valid`` are frames that the peer takes."""
    parts = 1 if rng.random() < 0.95 else rng.randrange(2, 40)
    return [rng.choice(_MAKERS)(rng, valid) for _ in range(parts)]
