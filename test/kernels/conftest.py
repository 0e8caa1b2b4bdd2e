"""Every ISA path that this machine has, for both dtypes of a model."""

from __future__ import annotations

import itertools

import pytest
import torch
from crosspool.kernels.native_dense import available_isas
from crosspool.kernels.native_kernels import NativeKernels

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        paths = list(itertools.product(available_isas(), DTYPES))
        metafunc.parametrize("path", paths, ids=["-".join(path) for path in paths])


@pytest.fixture
def native(path: tuple[str, str]) -> NativeKernels:
    """The kernels as a team of three would call them."""
    isa, dtype = path
    return NativeKernels(DTYPES[dtype], isa, shares=3)


@pytest.fixture
def dtype(path: tuple[str, str]) -> torch.dtype:
    return DTYPES[path[1]]


@pytest.fixture
def whole(path: tuple[str, str]) -> NativeKernels:
    """The same kernels called by one thread."""
    isa, dtype = path
    return NativeKernels(DTYPES[dtype], isa)
