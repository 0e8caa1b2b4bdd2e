"""Builds and runs the native tests of a GPU's lanes over the fake driver, under the address
sanitizer where it works."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.fake_cuda_graphs import COMPILER, HOST_SIDE, compile_sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

CHECKS = {"lane_check": "60", "exchange_check": "30"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    sanitize = "-fsanitize=address,undefined"
    folder = tmp_path_factory.mktemp("empty")
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    built = subprocess.run([COMPILER, sanitize, source, "-o", program], timeout=60)
    works = built.returncode == 0 and subprocess.run([program], timeout=60).returncode == 0
    return ["-O1", *([sanitize, "-fno-sanitize-recover=all"] if works else [])]


def test_lanes_and_exchange(flags: list[str], tmp_path: Path) -> None:
    tests = [f"test/{name}.cpp" for name in CHECKS]
    objects = compile_sources((*HOST_SIDE, *tests), tmp_path, flags)
    shared = [one for one in objects if one.stem not in CHECKS]
    for name, deployments in CHECKS.items():
        program = tmp_path / name
        command = [
            COMPILER,
            *flags,
            *shared,
            tmp_path / f"{name}.o",
            "-o",
            program,
        ]
        subprocess.run(command, check=True, timeout=60)
        done = subprocess.run(
            [program, deployments], capture_output=True, text=True, timeout=120, env={}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(f"{deployments} deployments")
