"""The GPU libraries where they were built: what they say without a GPU; and their build."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from crosspool.kernels import cuda_loop, nvshmem

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"


def test_the_loop_says_that_there_is_no_gpu() -> None:
    if cuda_loop.library_path() is None:
        pytest.skip("libcrosspool_cuda.so was not built here")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(cuda_loop.CudaLoopError, match="cudaError"):
        cuda_loop.CudaLoop(
            [cuda_loop.ModelStages(kinds=(True,))], [cuda_loop.LanePlaces(32, 32)], [1]
        )


def test_nvshmem_makes_an_id() -> None:
    try:
        library = nvshmem.Nvshmem()
    except ImportError as error:
        pytest.skip(str(error))
    os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "lo")
    first, second = library.unique_id(), library.unique_id()
    assert len(first) == nvshmem.UNIQUE_ID_BYTES
    assert first != second
    with pytest.raises(ValueError, match="127 bytes"):
        library.init(0, 1, first[:-1])


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ((), "CROSSPOOL_CUDA is OFF: libcrosspool_cuda is not built"),
        (("-DCROSSPOOL_CUDA=AUTO",), "No nvcc: libcrosspool_cuda is not built"),
        (("-DCROSSPOOL_CUDA=ON",), None),
    ],
)
def test_the_build_without_nvcc(option: tuple[str, ...], says: str | None, tmp_path: Path) -> None:
    """CMake finds no CUDA compiler: neither on the path nor where toolkits lie. Only a build that
    was told to have one fails."""
    project = tmp_path / "CMakeLists.txt"
    project.write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        "project(without_nvcc LANGUAGES CXX)\n"
        f"add_subdirectory({NATIVE / 'cuda'} cuda)\n"
        'if(TARGET crosspool_cuda)\n  message(FATAL_ERROR "built")\nendif()\n'
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build"]
    done = subprocess.run(
        [*command, "-DCMAKE_CUDA_COMPILER=NOTFOUND", *option],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if says is None:
        assert done.returncode != 0 and "CROSSPOOL_CUDA=ON needs nvcc" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(says) == 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_scheduler_is_small(tmp_path: Path) -> None:
    """A pass comes between any two stages, cold: its code must stay within an instruction cache."""
    cubin = tmp_path / "scheduler.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-arch=sm_90", "-rdc=true", "--Werror=all-warnings"]
    source = NATIVE / "cuda/scheduler.cu"
    include = ["-I", NATIVE / "include"]
    subprocess.run([*command, *include, "-cubin", source, "-o", cubin], check=True, timeout=240)
    table = subprocess.run(
        ["readelf", "-sW", cubin], capture_output=True, text=True, check=True
    ).stdout
    functions = [line.split() for line in table.splitlines() if " FUNC " in line]
    sizes = {words[-1]: int(words[2], 0) for words in functions}
    assert any("scheduler" in name for name in sizes)
    assert sum(sizes.values()) < 64 << 10, sizes
