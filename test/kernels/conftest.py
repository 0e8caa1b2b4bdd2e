"""Every ISA path that this machine has, for both dtypes of a model; and a fake CUDA driver with a
GPU's resident loop over it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crosspool.kernels.isa import available_isas
from support import fake_cuda_graphs
from support.fake_cuda_graphs import FakeCuda
from support.native_kernels import NativeKernels

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


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


@pytest.fixture(params=["auto", *FLOAT8])
def kv_dtype(request: pytest.FixtureRequest, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a KV cache: the model's, or floats of 8 bits."""
    return FLOAT8.get(request.param, dtype)


@pytest.fixture(params=FLOAT8)
def float8(request: pytest.FixtureRequest) -> torch.dtype:
    return FLOAT8[request.param]


@pytest.fixture
def whole(path: tuple[str, str]) -> NativeKernels:
    """The same kernels called by one thread."""
    isa, dtype = path
    return NativeKernels(DTYPES[dtype], isa)


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda_graphs.build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def driver(fake_library: Path) -> Iterator[FakeCuda]:
    fake = FakeCuda(fake_library)
    yield fake
    fake.close()
