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
from crosspool.kernels.triton_cache.launches import Launch, recording


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


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Makes a launch compile the kernel for sm_<capability> and launch nothing. The list fills with
    what was compiled. Arrays are never touched."""
    compiled: list[Compiled] = []

    def compile_it(launch: Launch) -> None:
        compiled.append(_describe(launch.compile(), launch.grid))

    with recording(capability, compile_it):
        yield compiled


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
