"""Python interface of ``libcrosspool_nvshmem.so`` (sgl-kernel-ext/cuda/nvshmem.h): NVSHMEM in one
process, and the kernels that carry dispatches and replies where a peer's memory is out of reach.

The library is built where CMake knows NVSHMEM's wheel (``-DCROSSPOOL_NVSHMEM=...``).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from ctypes import c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path

import crosspool.kernels
from crosspool.kernels import native

LIBRARY = "libcrosspool_nvshmem.so"
_HOST_LIBRARY = "libnvshmem_host.so.3"
UNIQUE_ID_BYTES = 128
"""sizeof(nvshmemx_uniqueid_t)."""


class LinkEnd(ctypes.Structure):
    """crosspool_nvshmem_end: a link's symmetric address, and the other end's PE."""

    _fields_ = (("link", c_uint64), ("peer", c_int32), ("reserved", c_int32))


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "crosspool_abi_version": (c_uint32, ()),
    "crosspool_nvshmem_unique_id": (c_int32, (c_void_p,)),
    "crosspool_nvshmem_init": (c_int32, (c_int32, c_int32, c_void_p)),
    "crosspool_nvshmem_allocate": (c_void_p, (c_uint64,)),
    "crosspool_nvshmem_finalize": (None, ()),
    "crosspool_nvshmem_dispatch": (
        c_int32,
        (LinkEnd, c_uint64, c_uint64, c_uint32, c_uint32, c_void_p),
    ),
    "crosspool_nvshmem_reply": (c_int32, (c_uint64, c_uint64, c_uint64, c_void_p)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Loads the library, with typed functions.

    Raises ImportError when it was not built, or NVSHMEM's own library is not installed."""
    folders = [Path(folder) for folder in crosspool.kernels.__path__]
    found = next((folder / LIBRARY for folder in folders if (folder / LIBRARY).is_file()), None)
    if found is None:
        raise ImportError(
            f"CrossPool's library {LIBRARY} was not built: `pip install . -C"
            " cmake.define.CROSSPOOL_CUDA=ON -C"
            " cmake.define.CROSSPOOL_NVSHMEM=<site-packages>/nvidia/nvshmem` with nvcc on PATH"
        )
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            ctypes.CDLL(str(Path(folder) / "lib" / _HOST_LIBRARY), mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(found))
    except (OSError, ModuleNotFoundError) as error:
        raise ImportError(f"{LIBRARY} cannot be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    if loaded.crosspool_abi_version() != native.ABI_VERSION:
        raise ImportError(f"{found} is not of version {native.ABI_VERSION}: build it again")
    return loaded


class Nvshmem:
    """NVSHMEM in this process, on the current GPU. Calls raise RuntimeError when it refuses."""

    def __init__(self) -> None:
        self._native = library()

    def unique_id(self) -> bytes:
        """nvshmemx_get_uniqueid: returns 128 bytes, which one PE makes for all."""
        memory = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
        self._check(self._native.crosspool_nvshmem_unique_id(memory), "nvshmemx_get_uniqueid")
        return memory.raw

    def init(self, pe: int, pes: int, unique_id: bytes) -> None:
        """nvshmemx_init_attr with the id: returns when all PEs have called it. Where it fails,
        NVSHMEM itself ends the process, with its reason on stderr."""
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise ValueError(f"unique_id: {len(unique_id)} bytes, not {UNIQUE_ID_BYTES}")
        self._check(
            self._native.crosspool_nvshmem_init(pe, pes, unique_id),
            f"nvshmemx_init_attr of PE {pe} of {pes}",
        )

    def allocate(self, nbytes: int) -> int:
        """nvshmem_calloc, called by all PEs together: returns the address of zeros in symmetric
        memory."""
        address = self._native.crosspool_nvshmem_allocate(nbytes)
        if address is None:
            raise RuntimeError(f"nvshmem_calloc: no room for {nbytes} bytes in symmetric memory")
        return int(address)

    def finalize(self) -> None:
        """nvshmem_finalize, called by all PEs together: frees what was allocated."""
        self._native.crosspool_nvshmem_finalize()

    def capture_dispatch(
        self, end: LinkEnd, *, words: int, epoch: int, model: int, row_bytes: int, stream: int
    ) -> None:
        """Launches, into a stream under capture, the kernel that ends a ``DISPATCH`` graph. It
        carries the rows in the link's own dispatch payload to the peer. ``words``: address of the
        lane's ``StageWords``."""
        status = self._native.crosspool_nvshmem_dispatch(
            end, words, epoch, model, row_bytes, stream
        )
        self._check(status, "launching the dispatch kernel")

    def capture_reply(self, ends: int, payload_bytes: int, words: int, stream: int) -> None:
        """Launches, into a stream under capture, the kernel that ends the FFN graph of a lane that
        serves. It carries the reply, in the combine payload of the link through which the dispatch
        came. ``ends``: device address of the lane's ``LinkEnd``s; ``words``: address of its
        ``StageWords``."""
        status = self._native.crosspool_nvshmem_reply(ends, payload_bytes, words, stream)
        self._check(status, "launching the reply kernel")

    @staticmethod
    def _check(status: int, what: str) -> None:
        if status != 0:
            raise RuntimeError(f"{what} failed with status {status}")


def device_ends(links: Sequence[int], peers: Sequence[int]) -> bytes:
    """Returns the ``LinkEnd``s of a lane that serves, as they lie on the device."""
    ends = [LinkEnd(link, peer, 0) for link, peer in zip(links, peers, strict=True)]
    return b"".join(map(bytes, ends))
