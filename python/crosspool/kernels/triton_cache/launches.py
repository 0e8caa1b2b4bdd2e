"""Launches recorded for a GPU that need not be there, and their kernels, compiled.

A launch is recorded as Triton specialises it: by the arguments' dtypes, by whether addresses and
numbers are divisible by 16, and by the constants. So arrays are never touched, and tensors on
torch's device ``meta`` will do, since they keep their offsets.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched. Processes can pass it to each other."""

    capability: int
    """Compute capability of the GPU: 90 for sm_90."""
    module: str
    kernel: str
    """Name of the kernel in its module."""
    grid: tuple[int, ...]
    signature: Mapping[str, str]
    """Triton's type of each argument."""
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def entry(self) -> str:
        """Name of the compiled kernel's folder in Triton's cache."""
        source, backend = self._source(), make_backend(self._target)
        options = backend.parse_options(dict(self.options))
        key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
        return entry_of(key)

    def compile(self) -> Any:
        """Compiles the kernel, or finds it in Triton's cache. Returns triton's CompiledKernel."""
        return triton.compile(self._source(), target=self._target, options=dict(self.options))

    @property
    def _target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def _source(self) -> ASTSource:
        function = getattr(importlib.import_module(self.module), self.kernel)
        return ASTSource(
            function, dict(self.signature), dict(self.constants), dict(self.attributes)
        )


def entry_of(key: str) -> str:
    """Name of the folder in which Triton's cache keeps what is compiled under ``key``."""
    return base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")


@contextmanager
def recording(
    capability: int, on_launch: Callable[[Launch], None] = lambda _: None
) -> Iterator[list[Launch]]:
    """Makes every launch of a kernel fill the list, in order, and launch nothing; ``on_launch`` is
    called with each."""
    launches: list[Launch] = []
    run, compile_ = JITFunction.run, JITFunction._do_compile
    grid: tuple[int, ...] = ()

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del warmup
        record_grid(tuple(grid))
        run(self, *args, grid=grid, warmup=True, **options)

    def record_grid(of_launch: tuple[int, ...]) -> None:
        nonlocal grid
        grid = of_launch

    def record(self: Any, *compilation: Any) -> None:
        """Triton takes None for: a hook has done without this kernel."""
        _, signature, _, constants, options, attributes, _ = compilation
        launches.append(
            Launch(
                capability=capability,
                module=self.module,
                kernel=self.__name__,
                grid=grid,
                signature=dict(signature),
                constants=dict(constants),
                attributes=dict(attributes),
                options=dict(options.__dict__),
            )
        )
        on_launch(launches[-1])

    before = driver._active
    JITFunction.run, JITFunction._do_compile = warm_up, record
    driver.set_active(_Device(capability))
    try:
        yield launches
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_
        driver._active = before


class _Device:
    """The driver of a device of which only the architecture is known."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        """A number that no GPU of the machine has: Triton keeps what it knows by this number."""
        return 1000 + int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        del device
        return 0
