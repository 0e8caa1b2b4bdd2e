"""Triton loads no kernel beside a resident loop: its own code, over a driver that takes notes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from crosspool.kernels.residency import Residency, ResidencyError
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver


@triton.jit
def kernel(x):
    tl.store(x, 1)


class _Noting:
    """The driver of a device, as far as loading a kernel asks for it."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launcher_cls = lambda source, metadata: "launcher"
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": 1 << 20}
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.loaded.append(name)
        return "module", "function", 0, 0, 1024


def test_no_kernel_is_loaded_beside_a_resident_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    noting, residency, loop = _Noting(), Residency("cuda:0"), object()
    monkeypatch.setattr(driver, "_active", noting)
    source = ASTSource(kernel, {"x": "*i32"})

    def load() -> None:
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).run == "launcher"

    with residency.over_triton():
        load()
        residency.enter(loop)
        what = "^loading the Triton kernel kernel: the resident loop on cuda:0 is on the device"
        with pytest.raises(ResidencyError, match=what):
            load()
        assert noting.loaded == ["kernel"]
        residency.leave(loop)
        load()
        residency.enter(loop)
    load()
    assert noting.loaded == ["kernel"] * 3
