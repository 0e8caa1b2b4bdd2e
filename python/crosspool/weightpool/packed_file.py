"""The beginning of a file of packed weights, which tells what weights it holds, and where.

A head comes first, then a table as MessagePack, then the bytes of the weights. The head has the
table's size and checksum, and the table the checksums of the weights: what was cut off, half
written, or changed since is not taken for weights.
"""

from __future__ import annotations

import hashlib
import os
import struct

import msgspec

MAGIC = b"CP-PACK\0"
_HEAD = struct.Struct("<8sQ32s")
_MOST_TABLE_BYTES = 1 << 30
_ALIGNMENT = 4096


class DamagedFile(ValueError):
    """A file that is no whole file of the weights that were asked for; the message says why."""


class PackedMatrix(msgspec.Struct, frozen=True, array_like=True):
    """A matrix of the arena."""

    offset: int
    """Place within the arena, in bytes."""
    encoding: int
    checksum: int


class PackedTable(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds: first the arena, then the arrays one after another, all of them in the
    order in which their reader declares them."""

    key: str
    """Names the weights and the form that they are in."""
    arena_bytes: int
    matrices: list[PackedMatrix]
    arrays: list[int]
    """Checksums."""
    weight_bytes: int
    """Bytes of the arena and the arrays."""
    broken: list[str]
    """Names of tensors that hold NaN or infinite values."""


def encode(table: PackedTable) -> bytes:
    """Returns what stands before the weights."""
    data = msgspec.msgpack.encode(table)
    head = _HEAD.pack(MAGIC, len(data), hashlib.sha256(data).digest())
    return (head + data).ljust(_begin(len(data)), b"\0")


def read_head(file: int) -> bytes:
    """Returns the head of an open file, which no two files of different weights have alike. Raises
    OSError."""
    return os.pread(file, _HEAD.size, 0)


def read(file: int, key: str) -> tuple[PackedTable, int]:
    """Returns the table of an open file, and the place in bytes at which its weights begin.

    Raises DamagedFile when it is not whole, or holds something else than ``key``. Raises
    OSError."""
    head = read_head(file)
    if len(head) < _HEAD.size:
        raise DamagedFile("it has no head")
    magic, size, digest = _HEAD.unpack(head)
    if magic != MAGIC:
        raise DamagedFile("it does not begin as a file of packed weights does")
    data = os.pread(file, min(size, _MOST_TABLE_BYTES), _HEAD.size)
    if hashlib.sha256(data).digest() != digest:
        raise DamagedFile("its table has another checksum")
    try:
        table = msgspec.msgpack.decode(data, type=PackedTable)
    except msgspec.DecodeError as error:
        raise DamagedFile(f"its table cannot be read: {error}") from None
    if table.key != key:
        raise DamagedFile("it holds other weights than its name says")
    begin = _begin(size)
    found, right = os.fstat(file).st_size, begin + table.weight_bytes
    if found != right:
        raise DamagedFile(f"it has {found} bytes instead of {right}")
    return table, begin


def _begin(table_bytes: int) -> int:
    return -(-(_HEAD.size + table_bytes) // _ALIGNMENT) * _ALIGNMENT
