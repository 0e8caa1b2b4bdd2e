"""The calls of :class:`~crosspool.kernels.cuda_driver.CudaDriver` without a GPU: real memory of the
CPU under real address ranges, and every limit that cuda.h documents enforced.

- Sizes and addresses are multiples of the granularity.
- A mapping covers all of its handle's memory, lies in one reservation, and overlaps no other.
- Nobody may touch a mapping before access is set: its pages fault until then, as after unmapping.
- Access is set for whole mappings side by side; unmapping takes exactly one.
- A reservation is freed whole, with nothing mapped in it.
- Memory is free again when its handle is released by everyone and it is mapped nowhere. A released
  handle is of no more use.
- A descriptor is the memory's own (a memfd), so that another process can import it.
- A pointer into a reservation is known only where memory that may be touched is mapped. Triton asks
  that of every tensor that a kernel gets (support/triton_interpreter.py).

What the driver leaves undefined (a handle that does not exist) is refused too. ``fail`` makes the
next call of a name fail, as a driver may at any time; ``not_ready`` makes setting access fail as
under queued work. Unmapping what kernels under way may touch is a violation, which is kept: on a
GPU it is a fault, some time. New memory is full of NaN.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from crosspool.kernels.cuda_driver import NOT_READY, CudaError
from crosspool.kernels.dlpack import DLPACK_CPU, DLPackDevice

INVALID = "CUDA_ERROR_INVALID_VALUE"
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

CPU = DLPackDevice(DLPACK_CPU, 0)

_NAN = b"\xff" * (1 << 20)
_FIXED = 0x10
_NO_RESERVE = 0x4000
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


_devices: weakref.WeakSet[FakeCuda] = weakref.WeakSet()


@dataclass
class Memory:
    """Physical memory of one handle."""

    descriptor: int
    nbytes: int
    handles: int = 1
    mappings: int = 0


@dataclass
class Mapping:
    memory: Memory
    accessible: bool = False


@dataclass(eq=False)
class FakeCuda:
    """One device of ``total`` bytes."""

    total: int
    granularity: int = 2 << 20
    name: str = "cuda:0"
    dlpack_device: DLPackDevice = CPU
    reservations: dict[int, int] = field(default_factory=dict)
    """Bytes of each reservation by its address."""
    mappings: dict[int, Mapping] = field(default_factory=dict)
    """Mappings by their addresses."""
    handles: dict[int, Memory] = field(default_factory=dict)
    fail: dict[str, tuple[int, str]] = field(default_factory=dict)
    """How many more calls of each name succeed, and the error code of the one after them."""
    not_ready: int = 0
    """How many more times setting access finds work queued."""
    running: Callable[[], Iterable[tuple[int, int]]] = tuple
    """Address and bytes of the ranges that kernels under way may touch."""
    violations: list[str] = field(default_factory=list)
    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    used: int = 0
    """Bytes of memory that exist."""
    _next_handle: int = 0x1000

    def __post_init__(self) -> None:
        _devices.add(self)

    def memory(self) -> tuple[int, int]:
        self._enter("memory")
        return self.total - self.used, self.total

    def reserve(self, nbytes: int) -> int:
        self._enter("reserve", nbytes)
        self._check("reserve", nbytes > 0 and nbytes % self.granularity == 0)
        space = nbytes + self.granularity
        raw = _map(0, space, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, -1)
        address = -(-raw // self.granularity) * self.granularity
        if address > raw:
            _libc.munmap(raw, address - raw)
        _libc.munmap(address + nbytes, raw + space - address - nbytes)
        self.reservations[address] = nbytes
        return address

    def free_reservation(self, address: int, nbytes: int) -> None:
        self._enter("free_reservation", address, nbytes)
        self._check("free_reservation", self.reservations.get(address) == nbytes)
        self._check("free_reservation", not self._mapped_in(address, nbytes))
        _libc.munmap(address, nbytes)
        del self.reservations[address]

    def create(self, nbytes: int) -> int:
        self._enter("create", nbytes)
        self._check("create", nbytes > 0 and nbytes % self.granularity == 0)
        self._check("create", self.used + nbytes <= self.total, OUT_OF_MEMORY)
        descriptor = os.memfd_create("fake-cuda", os.MFD_CLOEXEC)
        for at in range(0, nbytes, len(_NAN)):
            os.pwrite(descriptor, _NAN[: nbytes - at], at)
        self.used += nbytes
        return self._new_handle(Memory(descriptor, nbytes))

    def release(self, handle: int) -> None:
        self._enter("release", handle)
        self._check("release", handle in self.handles)
        memory = self.handles.pop(handle)
        memory.handles -= 1
        self._settle(memory)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._enter("map", address, nbytes, handle)
        self._check("map", handle in self.handles and nbytes == self.handles[handle].nbytes)
        self._check("map", address % self.granularity == 0)
        self._check("map", self._reserved(address, nbytes))
        self._check("map", not self._mapped_in(address, nbytes))
        memory = self.handles[handle]
        memory.mappings += 1
        self.mappings[address] = Mapping(memory)
        _map(address, nbytes, _NONE, mmap.MAP_SHARED | _FIXED, memory.descriptor)

    def set_access(self, address: int, nbytes: int) -> None:
        self._enter("set_access", address, nbytes)
        if self.not_ready:
            self.not_ready -= 1
            raise CudaError("set_access", NOT_READY)
        covered = self._mapped_in(address, nbytes)
        first = min(covered, default=-1)
        whole = sum(self.mappings[a].memory.nbytes for a in covered)
        self._check("set_access", nbytes > 0 and first == address and whole == nbytes)
        for start in covered:
            self.mappings[start].accessible = True
        _libc.mprotect(address, nbytes, _READ_WRITE)

    def unmap(self, address: int, nbytes: int) -> None:
        self._enter("unmap", address, nbytes)
        mapping = self.mappings.get(address)
        self._check("unmap", mapping is not None and mapping.memory.nbytes == nbytes)
        assert mapping is not None
        for begin, size in self.running():
            if begin < address + nbytes and address < begin + size:
                self.violations.append(f"unmapped {address:#x} under a kernel")
                break
        del self.mappings[address]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE | _FIXED
        _map(address, nbytes, _NONE, flags, -1)
        mapping.memory.mappings -= 1
        self._settle(mapping.memory)

    def export(self, handle: int) -> int:
        self._enter("export", handle)
        self._check("export", handle in self.handles)
        return os.dup(self.handles[handle].descriptor)

    def import_descriptor(self, descriptor: int) -> int:
        """The memory is the exporter's: it does not count here."""
        self._enter("import_descriptor", descriptor)
        try:
            nbytes = os.fstat(descriptor).st_size
        except OSError:
            raise CudaError("import_descriptor", INVALID) from None
        self._check("import_descriptor", nbytes > 0 and nbytes % self.granularity == 0)
        return self._new_handle(_Imported(os.dup(descriptor), nbytes))

    def knows_pointer(self, address: int) -> bool:
        """Says whether cuPointerGetAttribute finds memory at an address of a reservation; True
        outside of all reservations."""
        return not self._reserved(address, 1) or any(
            self.mappings[start].accessible for start in self._mapped_in(address, 1)
        )

    @property
    def accessible_bytes(self) -> int:
        return sum(m.memory.nbytes for m in self.mappings.values() if m.accessible)

    @property
    def is_clean(self) -> bool:
        """Whether everything was given back."""
        return not (self.reservations or self.mappings or self.handles or self.used)

    def _enter(self, call: str, *arguments: int) -> None:
        self.calls.append((call, arguments))
        if call in self.fail:
            left, code = self.fail[call]
            if left == 0:
                del self.fail[call]
                raise CudaError(call, code)
            self.fail[call] = left - 1, code

    def _check(self, call: str, holds: bool, code: str = INVALID) -> None:
        if not holds:
            raise CudaError(call, code)

    def _new_handle(self, memory: Memory) -> int:
        self._next_handle += 1
        self.handles[self._next_handle] = memory
        return self._next_handle

    def _reserved(self, address: int, nbytes: int) -> bool:
        return any(
            start <= address and address + nbytes <= start + size
            for start, size in self.reservations.items()
        )

    def _mapped_in(self, address: int, nbytes: int) -> list[int]:
        """Mappings that overlap the range, ascending."""
        return sorted(
            start
            for start, mapping in self.mappings.items()
            if start < address + nbytes and address < start + mapping.memory.nbytes
        )

    def _settle(self, memory: Memory) -> None:
        if memory.handles == 0 and memory.mappings == 0:
            os.close(memory.descriptor)
            if not isinstance(memory, _Imported):
                self.used -= memory.nbytes


class _Imported(Memory):
    """Memory of another process."""


def every_device_knows_pointer(address: int) -> bool:
    """Says whether no device of this process has a reservation there with nothing to be touched."""
    return all(device.knows_pointer(address) for device in _devices)


def _map(address: int, nbytes: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address or None, nbytes, protection, flags, descriptor, 0)
    if found == _FAILED:
        raise OSError(ctypes.get_errno(), f"mmap of {nbytes} bytes")
    return int(found)
