"""The driver's calls: their arguments against a libcuda.so.1 that says what it was asked, without a
GPU; and what they do, on a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crosspool.kernels.cuda_driver import CudaBindings, CudaError
from crosspool.kernels.dlpack import tensor_at

SOURCE = Path(__file__).parents[2] / "sgl-kernel-ext" / "test" / "libcuda.c"
UNIT = 2 << 20

CALLS = """
import os
from crosspool.kernels.cuda_driver import CudaBindings
driver = CudaBindings(3)
print("python", driver.granularity, driver.dlpack_device, driver.memory(), flush=True)
address = driver.reserve(8 << 20)
handle = driver.create(4 << 20)
driver.map(address, 4 << 20, handle)
driver.set_access(address, 8 << 20)
descriptor = driver.export(handle)
imported = driver.import_descriptor(descriptor)
os.fstat(descriptor)  # stays the caller's
driver.unmap(address, 4 << 20)
driver.release(imported)
driver.free_reservation(address, 8 << 20)
"""

REFUSED = """
import os
from crosspool.kernels.cuda_driver import CudaBindings, CudaError
driver = CudaBindings(0)
for name, call, arguments in (
    ("cuMemAddressReserve", driver.reserve, (2 << 20,)),
    ("cuMemCreate", driver.create, (2 << 20,)),
    ("cuMemMap", driver.map, (0, 2 << 20, 1)),
    ("cuMemUnmap", driver.unmap, (0, 2 << 20)),
):
    os.environ["LIBCUDA_FAILS"] = name
    try:
        call(*arguments)
    except CudaError as error:
        print("refused", error, flush=True)
"""

QUEUED = """
import os
from crosspool.kernels.cuda_driver import CudaBindings, CudaError, allow_access
driver = CudaBindings(2)
print("refused", allow_access(driver, 2 << 20, 4 << 20), "times", flush=True)
os.environ["LIBCUDA_NOT_READY"] = "1000000"
try:
    allow_access(driver, 2 << 20, 4 << 20, patience_s=0.05)
except CudaError as error:
    print(error, flush=True)
"""

HEARD = """\
init 0
device 3
retain 43
current 0x7000
attribute 102 of 43
attribute 103 of 43
properties 1 1 1 3; granularity 0
info
python 2097152 DLPackDevice(kind=2, ordinal=3) (25769803776, 85899345920)
reserve 8388608 2097152 0 0
properties 1 1 1 3; create 4194304 0
map 0x7f1234000000 4194304 0 0xfedcba9876543210 0
access 0x7f1234000000 8388608 1: 1 3 3
export 0xfedcba9876543210 1 0
import open 1
unmap 0x7f1234000000 4194304
release 0x5151
free 0x7f1234000000 8388608
"""

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    """Runs Python code on the library that speaks."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc, whose cuda.h is needed")
    folder = tmp_path_factory.mktemp("libcuda")
    flags = ["-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror"]
    command = [nvcc, *flags, str(SOURCE), "-o", str(folder / "libcuda.so.1"), "-ldl"]
    subprocess.run(command, check=True, timeout=120)

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **paths, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_arguments_arrive_as_declared(libcuda):
    done = libcuda(CALLS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == HEARD


def test_a_refused_call_says_which_and_why(libcuda):
    done = libcuda(REFUSED)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert said == [
        "refused cuMemAddressReserve: CUDA_ERROR_OUT_OF_MEMORY",
        "refused cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY",
        "refused cuMemMap: CUDA_ERROR_OUT_OF_MEMORY",
        "refused cuMemUnmap: CUDA_ERROR_OUT_OF_MEMORY",
    ]


def test_access_is_asked_for_again_while_the_driver_is_not_ready(libcuda):
    done = libcuda(QUEUED, LIBCUDA_NOT_READY="3")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "properties" not in line]
    first = said.index("refused 3 times")
    assert said[first - 4 : first] == ["access 0x200000 4194304 1: 1 2 3"] * 4
    assert 5 < len(said) - first - 2 < 50
    assert said[-1] == (
        "cuMemSetAccess: CUDA_ERROR_NOT_READY (for 0.05 s: the work queued on cuda:2 does not end)"
    )


def test_a_device_that_is_refused_is_a_clear_error(libcuda):
    done = libcuda(CALLS, LIBCUDA_FAILS="cuDeviceGet")
    said = "device cuda:3 cannot be used: cuDeviceGet: CUDA_ERROR_OUT_OF_MEMORY\n"
    assert done.stderr.endswith(f"ConfigError: {said}")


@pytest.fixture
def driver():
    torch.cuda.init()
    return CudaBindings(0)


@gpu
@needs_gpu
def test_the_driver_refuses_what_the_fake_one_refuses(driver):
    """Compares the real driver with what cuda.h defines."""
    unit = driver.granularity
    base, handle, wide = driver.reserve(4 * unit), driver.create(unit), driver.create(2 * unit)
    try:
        driver.map(base, 2 * unit, wide)
        for refused in (
            lambda: driver.map(base, unit, handle),
            lambda: driver.map(base + 3 * unit + 4096, unit, handle),
            lambda: driver.create(unit // 2),
            lambda: driver.unmap(base, unit),
            lambda: driver.set_access(base, 3 * unit),
        ):
            with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_VALUE"):
                refused()
        driver.set_access(base, 2 * unit)
        driver.unmap(base, 2 * unit)
    finally:
        driver.release(handle)
        driver.release(wide)
        driver.free_reservation(base, 4 * unit)


@gpu
@needs_gpu
def test_memory_is_free_again_when_released_and_unmapped(driver):
    nbytes = 256 * driver.granularity
    before = driver.memory()[0]
    base, handle = driver.reserve(nbytes), driver.create(nbytes)
    driver.map(base, nbytes, handle)
    driver.release(handle)
    assert driver.memory()[0] <= before - nbytes
    driver.unmap(base, nbytes)
    assert driver.memory()[0] > before - nbytes
    driver.free_reservation(base, nbytes)


@gpu
@needs_gpu
def test_imported_memory_is_the_exporters(driver):
    unit = driver.granularity
    base, handle = driver.reserve(2 * unit), driver.create(unit)
    descriptor = driver.export(handle)
    imported = driver.import_descriptor(descriptor)
    os.close(descriptor)
    driver.map(base, unit, handle)
    driver.map(base + unit, unit, imported)
    driver.set_access(base, 2 * unit)
    seen = tensor_at(base, (2, unit // 4), torch.int32, driver.dlpack_device)
    seen[0] = torch.arange(unit // 4, device=seen.device, dtype=torch.int32)
    assert torch.equal(seen[1], seen[0])
    torch.cuda.synchronize()
    for address, used in ((base, handle), (base + unit, imported)):
        driver.unmap(address, unit)
        driver.release(used)
    driver.free_reservation(base, 2 * unit)
