"""The typed face of ``libcrosspool_cpu.so`` (sgl-kernel-ext/): chunks of memory, and signals.

The first call loads the library. ``pip install .`` and ``pip install -e .`` build it;
for a source tree on PYTHONPATH, ``cmake --install build/native --prefix python`` puts it beside
this file (sgl-kernel-ext/CMakeLists.txt says how). Calls release the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import crosspool.kernels
from crosspool.config.sizes import format_size

LIBRARY = "libcrosspool_cpu.so"
ABI_VERSION = 14
HUGE_PAGE = 2 << 20
"""Bytes of a huge page. Ranges are aligned to it, and chunks are multiples of it."""

_U64 = ctypes.c_uint64
_U64_POINTER = ctypes.POINTER(ctypes.c_uint64)
_ADDRESS_POINTER = ctypes.POINTER(ctypes.c_void_p)
_CHUNK_MOVE = (
    ctypes.c_int,
    (ctypes.c_void_p, ctypes.c_void_p, _U64, _U64_POINTER, _U64_POINTER, _U64, _U64_POINTER),
)
Signatures = dict[str, tuple[type | None, tuple[type, ...]]]
"""What functions of a library return and take, by their names."""

_SIGNATURES: Signatures = {
    "crosspool_isa": (ctypes.c_int32, ()),
    "crosspool_kernels": (ctypes.c_void_p, (ctypes.c_int32, ctypes.c_int32)),
    "crosspool_range_reserve": (ctypes.c_int, (_U64, _ADDRESS_POINTER)),
    "crosspool_parking_reserve": (ctypes.c_int, (_U64, _ADDRESS_POINTER)),
    "crosspool_arena_take": (ctypes.c_int, (ctypes.c_void_p, _U64)),
    "crosspool_arena_drop": (ctypes.c_int, (ctypes.c_void_p, _U64)),
    "crosspool_touch": (ctypes.c_int, (ctypes.c_void_p, _U64)),
    "crosspool_chunks_map": _CHUNK_MOVE,
    "crosspool_chunks_unmap": _CHUNK_MOVE,
    "crosspool_range_release": (ctypes.c_int, (ctypes.c_void_p, _U64)),
    "crosspool_signal_load": (_U64, (ctypes.c_void_p,)),
    "crosspool_signal_store": (None, (ctypes.c_void_p, _U64)),
    "crosspool_doorbell_rings": (ctypes.c_uint32, (ctypes.c_void_p,)),
    "crosspool_doorbell_ring": (None, (ctypes.c_void_p,)),
    "crosspool_doorbell_wait": (
        ctypes.c_uint32,
        (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int64, ctypes.c_int64),
    ),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the loaded library with typed functions.

    Raises ImportError when it is missing or has another version; the message says how to build
    it."""
    how = "build it with `pip install -e .` (or `make env`) in CrossPool's source tree"
    folders = [Path(folder) for folder in crosspool.kernels.__path__]
    found = next((folder / LIBRARY for folder in folders if (folder / LIBRARY).is_file()), None)
    if found is None:
        places = ", ".join(map(str, folders))
        raise ImportError(f"CrossPool's native library {LIBRARY} is not in {places}: {how}")
    try:
        native = ctypes.CDLL(str(found))
        version = native.crosspool_abi_version()
    except (OSError, AttributeError) as error:
        raise ImportError(f"{found} cannot be loaded ({error}): {how}") from error
    if version != ABI_VERSION:
        raise ImportError(f"{found} has version {version}, not {ABI_VERSION}: {how} again")
    declare(native, _SIGNATURES)
    return native


def declare(native: ctypes.CDLL, signatures: Signatures) -> None:
    """Gives functions of a loaded library their types."""
    for name, (result, arguments) in signatures.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments


def _check(status: int, what: str) -> None:
    if status < 0:
        raise OSError(-status, f"{what}: {os.strerror(-status)}")


def reserve_range(nbytes: int) -> int:
    """Reserves inaccessible address space, aligned to 2 MiB; returns where. Raises OSError."""
    address = ctypes.c_void_p()
    status = library().crosspool_range_reserve(nbytes, ctypes.byref(address))
    _check(status, f"reserving {format_size(nbytes)} of address space")
    return address.value or 0


def reserve_parking(nbytes: int) -> int:
    """Reserves a parking range, whose memory comes with :func:`touch`; returns where.

    Raises OSError."""
    address = ctypes.c_void_p()
    status = library().crosspool_parking_reserve(nbytes, ctypes.byref(address))
    _check(status, f"reserving a parking range of {format_size(nbytes)}")
    return address.value or 0


def take_arena(address: int, nbytes: int) -> None:
    """Makes a reserved range memory for weights, which forked children share. Raises OSError."""
    what = f"taking {format_size(nbytes)} for weights"
    _check(library().crosspool_arena_take(address, nbytes), what)


def drop_arena(address: int, nbytes: int) -> None:
    """Gives the memory of a range back to the system; the range stays reserved."""
    _check(library().crosspool_arena_drop(address, nbytes), "giving back memory of weights")


def touch(address: int, nbytes: int) -> None:
    """Makes the memory under a part of a parking range exist. Raises OSError."""
    _check(library().crosspool_touch(address, nbytes), "touching memory")


def release(address: int, nbytes: int) -> None:
    """Gives a range or parking range back to the system."""
    _check(library().crosspool_range_release(address, nbytes), "releasing memory")


def map_chunks(
    parking: int, target: int, chunk_bytes: int, slots: Sequence[int], chunks: Sequence[int]
) -> None:
    """Moves parking slot ``slots[i]`` under chunk ``chunks[i]`` of the range at ``target``.

    Raises OSError when a chunk cannot be moved. The chunks before it have moved, so the pool must
    not be used any more."""
    native, numbers, done = library(), _U64 * len(chunks), _U64()
    status = native.crosspool_chunks_map(
        parking, target, chunk_bytes, numbers(*slots), numbers(*chunks), len(chunks), done
    )
    _check(status, f"mapping chunk {done.value + 1} of {len(chunks)}")


def unmap_chunks(
    parking: int, target: int, chunk_bytes: int, slots: Sequence[int], chunks: Sequence[int]
) -> None:
    """Moves chunk ``chunks[i]`` of the range at ``target`` back to its parking slot ``slots[i]``.

    Raises OSError as :func:`map_chunks` does."""
    native, numbers, done = library(), _U64 * len(chunks), _U64()
    status = native.crosspool_chunks_unmap(
        parking, target, chunk_bytes, numbers(*slots), numbers(*chunks), len(chunks), done
    )
    _check(status, f"unmapping chunk {done.value + 1} of {len(chunks)}")


class Signal:
    """A 64-bit sequence number in shared memory that only grows; 8-byte aligned."""

    __slots__ = ("_address", "_native")

    def __init__(self, address: int) -> None:
        """The owner of the memory keeps it alive as long as the signal."""
        self._address = address
        self._native = library()

    def load(self) -> int:
        """Returns the number (acquire): all that its writer wrote before storing it is visible."""
        return int(self._native.crosspool_signal_load(self._address))

    def store(self, value: int) -> None:
        """Stores the next number (release), which publishes everything written before."""
        self._native.crosspool_signal_store(self._address, value)


class Doorbell:
    """Wakes one device that waits for any of its signals; 8 bytes of shared memory, zero at first.

    A writer stores its signal, then rings. A waiter reads :meth:`rings`, looks at its signals, and
    calls :meth:`wait` with the count that it read: a ring in between ends the wait at once."""

    __slots__ = ("_address", "_native")

    def __init__(self, address: int) -> None:
        """The owner of the memory keeps it alive as long as the doorbell."""
        self._address = address
        self._native = library()

    def rings(self) -> int:
        """Returns how often it rang, modulo 2**32."""
        return int(self._native.crosspool_doorbell_rings(self._address))

    def ring(self) -> None:
        self._native.crosspool_doorbell_ring(self._address)

    def wait(self, seen: int, spin_ns: int, timeout_ns: int) -> int:
        """Waits for a ring after ``seen``, spinning at most ``spin_ns``, for ``timeout_ns`` in all.

        Returns :meth:`rings`; it equals ``seen`` when time was up or a signal handler ran."""
        rings = self._native.crosspool_doorbell_wait(self._address, seen, spin_ns, timeout_ns)
        return int(rings)
