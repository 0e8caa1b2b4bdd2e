"""The host's side of a GPU: memory that both see, and streams. All of it is made before a resident
loop starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crosspool.kernels.cuda_loop import CudaLoop, CudaLoopError
from crosspool.kernels.residency import Residency
from crosspool.ranks.gpu.loop import DeviceLoop

PROBE_S = 5.0
"""Seconds within which every stream must make progress once a resident loop has started."""


class HostSide:
    """Makes page-locked memory and streams of one device, and keeps the stream in which the host
    works beside the lanes.

    On CPU tensors memory is the host's own, and there are no streams."""

    def __init__(self, device: torch.device, residency: Residency | None = None) -> None:
        """``residency``: the guard that a resident loop of the device uses, too."""
        self.device = device
        self.residency = residency or Residency(
            str(device), allocations if device.type == "cuda" else None
        )
        self._made: list[Any] = []
        self.stream = self.new_stream() if device.type == "cuda" else None
        """The stream beside the lanes'; None on CPU tensors. torch's default stream would wait for
        a loop that never ends, and torch's own pool creates more streams than there are connections
        to the device."""

    def full(self, shape: tuple[int, ...], value: int, dtype: torch.dtype) -> Tensor:
        """Returns page-locked memory, which the device can read and write. Raises ResidencyError
        beside a resident loop."""
        self.residency.check(f"page-locked memory of {torch.Size(shape).numel()} elements")
        return torch.full(shape, value, dtype=dtype, pin_memory=self.device.type == "cuda")

    def new_stream(self) -> torch.cuda.Stream:
        """Creates a stream that does not wait for the default one. Raises ResidencyError beside a
        resident loop, RuntimeError where CUDA refuses."""
        from cuda.bindings import driver

        self.residency.check("a stream")
        with torch.cuda.device(self.device):
            torch.zeros(1, device=self.device)  # makes the device's context, if there is none
            flags = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            error, stream = driver.cuStreamCreate(flags)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuStreamCreate: {error.name}")
        self._made.append(stream)
        return torch.cuda.ExternalStream(int(stream), self.device)

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """Makes the stream beside the lanes the current one."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def synchronize(self) -> None:
        """Waits for what the host has asked for beside the lanes."""
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        """Destroys the streams. No loop may be on the device."""
        if self._made:
            from cuda.bindings import driver

            for stream in self._made:
                driver.cuStreamDestroy(stream)
            self._made.clear()


def allocations() -> Mapping[str, int]:
    """Returns how often torch's allocators have asked CUDA for memory of the current device, and
    for page-locked memory."""
    device = torch.cuda.memory_stats_as_nested_dict()
    return {
        "device memory of torch": device.get("num_device_alloc", 0),
        "page-locked memory of torch": torch.cuda.host_memory_stats_as_nested_dict().get(
            "num_host_alloc", 0
        ),
    }


def start(loop: DeviceLoop, host: HostSide) -> None:
    """Starts a loop if it is a resident one; on a GPU, as :func:`start_probed` does."""
    if not isinstance(loop, CudaLoop):
        return
    if host.stream is None:
        loop.start()
    else:
        start_probed(loop, host.stream.cuda_stream)


def start_probed(loop: CudaLoop, beside: int, timeout_s: float = PROBE_S) -> None:
    """Starts a resident loop, and sees that every lane and the stream ``beside`` them
    (``cudaStream_t``) make progress.

    Raises CudaLoopError, with the loop quiesced, which names those that do not."""
    loop.start()
    if stuck := loop.probe(beside, timeout_s):
        loop.quiesce()
        connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "8 (CUDA's default)")
        raise CudaLoopError(
            f"no progress beside the resident loop within {timeout_s:g} s: {', '.join(stuck)}. A "
            "stream shares its connection to the device with a lane, behind which it waits for "
            f"ever. CUDA_DEVICE_MAX_CONNECTIONS is {connections}: set it to 32 before CUDA is "
            "loaded, or ask for fewer lanes"
        )
