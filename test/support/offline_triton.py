"""Compiles the kernels that a call would launch for a GPU that is not there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would be launched."""

    name: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    shared: int
    """Bytes of a block, those that the launch adds included."""
    spilled: int
    """Bytes of a thread's stack."""
    ptx: str


class _Device:
    """The driver of a device of which only the architecture is known."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Makes a launch compile the kernel for sm_<capability> and launch nothing. The list fills with
    what was compiled. Arrays are never touched."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(_describe(kernel, tuple(grid)))
        return kernel

    JITFunction.run = warm_up
    driver.set_active(_Device(capability))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None


def _describe(kernel: Any, grid: tuple[int, ...]) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return Compiled(
        name=kernel.metadata.name,
        grid=grid,
        warps=kernel.metadata.num_warps,
        registers=figures["REG"],
        shared=max(figures["SHARED"], kernel.metadata.shared),
        spilled=figures["STACK"],
        ptx=kernel.asm["ptx"],
    )
