"""The native code for aarch64: a cross compiler builds it, and its tests run under qemu's user
mode, on processors that have what a path needs and on others that lack it."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crosspool.kernels.isa import ISAS

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
    pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64"),
]
PATHS = ("portable", "neon", "neon_bf16")
PROCESSORS = {"cortex-a57": PATHS[:1], "neoverse-n1": PATHS[:2], "max": PATHS}
"""Models of qemu's and the paths that they have: the first lacks dotprod, the second bf16."""
PROGRAMS = {
    "engine_stress": "4",
    "kernels_check": "few",
    "waking_check": "",
    "signal_stress": "500",
    "team_stress": "20",
    "expert_pool_check": "200",
    "giving_back_check": "",
    "lane_check": "2",
    "exchange_check": "2",
}
"""Each with its argument, those first that take longest."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the library and of the programs, which are linked statically, so that qemu
    needs no libraries of another system."""
    folder = tmp_path_factory.mktemp("aarch64")
    options = [
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
        "-DCROSSPOOL_BUILD_TESTS=ON",
        "-DCROSSPOOL_KERNEL_OPTIMIZATION=-O2",
    ]
    for command in (
        ["cmake", "-S", str(NATIVE), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "-j", str(len(os.sched_getaffinity(0)))],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return folder


def run(
    build: Path, program: str, argument: str, processor: str = "max", isa: str = ""
) -> subprocess.CompletedProcess[str]:
    assert QEMU is not None
    return subprocess.run(
        [QEMU, "-cpu", processor, build / "test" / program, *filter(None, [argument])],
        env=os.environ | {"CROSSPOOL_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module")
def ended(build: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The programs, which have run beside one another."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = {name: pool.submit(run, build, name, of) for name, of in PROGRAMS.items()}
    return {name: future.result() for name, future in running.items()}


def test_the_library_is_built(build: Path) -> None:
    machine = (build / "libcrosspool_cpu.so").read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 183  # EM_AARCH64


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(ended: dict[str, subprocess.CompletedProcess[str]], program: str) -> None:
    done = ended[program]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if program == "kernels_check":
        assert done.stdout.split() == [*PATHS, *PATHS]  # in bfloat16, then in float32


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_processor_takes_the_best_path_that_it_has(build: Path, processor: str) -> None:
    paths = PROCESSORS[processor]
    done = run(build, "kernels_check", "paths", processor)
    assert done.stdout.split() == [*paths, "takes", paths[-1]], done.stderr
    for isa in ISAS:
        forced = run(build, "kernels_check", "paths", processor, isa)
        if isa in paths:
            assert forced.stdout.split()[-1] == isa
        else:
            assert forced.returncode == 1 and "does not have it" in forced.stderr
