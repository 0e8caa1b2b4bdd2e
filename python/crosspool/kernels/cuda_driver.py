"""The CUDA driver's calls that manage the virtual memory of one GPU, behind a narrow interface.

:class:`CudaDriver` has the calls that CrossPool needs; :class:`CudaBindings` makes them through
``cuda.bindings.driver``. Addresses, handles and descriptors are plain ints, sizes are bytes. cuda.h
says what each call demands; ``test/support/fake_cuda_memory.py`` enforces it without a GPU, and
``sgl-kernel-ext/test/libcuda.c`` checks how :class:`CudaBindings` calls the driver.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from crosspool.config.errors import ConfigError
from crosspool.kernels.dlpack import DLPACK_CUDA, DLPackDevice
from crosspool.kernels.residency import Residency

_MAY_WAIT = frozenset({"cuMemCreate", "cuMemRelease", "cuMemSetAccess", "cuMemUnmap"})
"""Calls that may wait for what runs on the device."""

NOT_READY = "CUDA_ERROR_NOT_READY"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 10e-3


class CudaError(RuntimeError):
    """A driver call failed."""

    def __init__(self, call: str, code: str, detail: str = "") -> None:
        super().__init__(f"{call}: {code}{detail and f' ({detail})'}")
        self.call = call
        self.code = code
        """Name of the CUresult, such as CUDA_ERROR_INVALID_VALUE."""

    @property
    def is_out_of_memory(self) -> bool:
        return self.code == "CUDA_ERROR_OUT_OF_MEMORY"


class CudaDriver(Protocol):
    """Virtual memory of one GPU. Every call raises CudaError when the driver refuses it."""

    name: str
    """Name of the device, as the deployment writes it."""
    granularity: int
    """Bytes of which sizes of memory and offsets of mappings must be multiples."""
    dlpack_device: DLPackDevice
    """Device of tensors over the memory."""

    def memory(self) -> tuple[int, int]:
        """cuMemGetInfo: returns the device's free bytes, and all of its bytes."""
        ...

    def reserve(self, nbytes: int) -> int:
        """cuMemAddressReserve: returns the address of a range with nothing mapped in it."""
        ...

    def free_reservation(self, address: int, nbytes: int) -> None:
        """cuMemAddressFree: gives a whole reservation back, in which nothing is mapped."""
        ...

    def create(self, nbytes: int) -> int:
        """cuMemCreate: returns a handle of memory on the device, which can be exported."""
        ...

    def release(self, handle: int) -> None:
        """cuMemRelease: gives a handle back. The memory is free once it is mapped nowhere, here or
        at a peer."""
        ...

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """cuMemMap: maps all of the handle's memory; it must not be touched before
        :meth:`set_access`."""
        ...

    def set_access(self, address: int, nbytes: int) -> None:
        """cuMemSetAccess: lets the device read and write whole adjacent mappings. May wait for
        running kernels, or say CUDA_ERROR_NOT_READY while work is queued: callers use
        :func:`allow_access`."""
        ...

    def unmap(self, address: int, nbytes: int) -> None:
        """cuMemUnmap: unmaps exactly one mapping. May wait for running kernels, or take the memory
        from under them: what they may touch must not be unmapped before the event of their end."""
        ...

    def export(self, handle: int) -> int:
        """cuMemExportToShareableHandle: returns a file descriptor, which the caller closes."""
        ...

    def import_descriptor(self, descriptor: int) -> int:
        """cuMemImportFromShareableHandle: returns a handle of a peer's memory, which the caller
        releases. The descriptor stays the caller's."""
        ...


def allow_access(driver: CudaDriver, address: int, nbytes: int, *, patience_s: float = 2.0) -> int:
    """Calls :meth:`CudaDriver.set_access`, and again as long as the driver says that it is not
    ready, which it may say while work is queued on the device. Returns how often it said so.

    Raises CudaError when the driver refuses, or is not ready within ``patience_s`` seconds."""
    began, pause, refusals = time.monotonic(), _FIRST_PAUSE_S, 0
    while True:
        try:
            driver.set_access(address, nbytes)
            return refusals
        except CudaError as error:
            if error.code != NOT_READY:
                raise
            if time.monotonic() - began > patience_s:
                raise CudaError(
                    error.call,
                    error.code,
                    f"for {patience_s:g} s: the work queued on {driver.name} does not end",
                ) from error
        refusals += 1
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class CudaBindings:
    """The driver's own calls, for the GPU ``cuda:index``.

    Retains the device's primary context, which torch uses too, and makes it current in the calling
    thread. Other threads call ``torch.cuda.set_device`` first."""

    def __init__(self, index: int, residency: Residency | None = None) -> None:
        """``residency``: the device's guard, asked before calls that may wait for what runs there.

        Raises ConfigError when there is no such GPU, no driver, no ``cuda-bindings``, or a GPU
        without virtual memory management."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ConfigError(f"device cuda:{index}: install cuda-bindings ({error})") from error
        self.name = f"cuda:{index}"
        self._residency = residency or Residency(self.name)
        self.dlpack_device = DLPackDevice(DLPACK_CUDA, index)
        self._driver: Any = driver
        try:
            self._call("cuInit", 0)
            device = self._call("cuDeviceGet", index)
            context = self._call("cuDevicePrimaryCtxRetain", device)
            self._call("cuCtxSetCurrent", context)
        except RuntimeError as error:
            raise ConfigError(f"device {self.name} cannot be used: {error}") from error
        attributes = driver.CUdevice_attribute
        for what, attribute in (
            (
                "virtual memory management",
                attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            ),
            (
                "memory handles as file descriptors",
                attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            ),
        ):
            if not self._call("cuDeviceGetAttribute", attribute, device):
                raise ConfigError(f"device {self.name} has no {what}")
        self._descriptors = (
            driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        )
        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = index
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = location
        self._properties.requestedHandleTypes = self._descriptors
        self._access = driver.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.granularity = int(
            self._call(
                "cuMemGetAllocationGranularity",
                self._properties,
                driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        )

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def reserve(self, nbytes: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, self.granularity, 0, 0))

    def free_reservation(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int) -> int:
        return int(self._call("cuMemCreate", nbytes, self._properties, 0))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._call("cuMemMap", address, nbytes, 0, handle, 0)

    def set_access(self, address: int, nbytes: int) -> None:
        self._call("cuMemSetAccess", address, nbytes, [self._access], 1)

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", address, nbytes)

    def export(self, handle: int) -> int:
        return int(self._call("cuMemExportToShareableHandle", handle, self._descriptors, 0))

    def import_descriptor(self, descriptor: int) -> int:
        call = "cuMemImportFromShareableHandle"
        return int(self._call(call, descriptor, self._descriptors))

    def _call(self, name: str, *arguments: Any) -> Any:
        """Makes a call. Returns its outputs: nothing, one value, or a tuple.

        Raises CudaError when the driver refuses it, ResidencyError where it may wait for ever."""
        if name in _MAY_WAIT:
            self._residency.check(name)
        result, *values = getattr(self._driver, name)(*arguments)
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise CudaError(name, result.name)
        return values[0] if len(values) == 1 else tuple(values)
