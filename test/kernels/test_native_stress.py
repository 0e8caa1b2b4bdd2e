"""Builds the native tests (sgl-kernel-ext/test/) under sanitizers and runs them: the stress tests,
and the check of the kernels on the portable and on this machine's best path, AMX emulated too."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from crosspool.kernels.isa import available_isas

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
]


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    # A sanitizer refuses to start beside an interposed allocator.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1200, env=environment
    )


def sanitizer_works(sanitizer: str, folder: Path) -> bool:
    """Whether a sanitizer runs here: some compilers lack its library, and some kernels' address
    layouts stop it."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    compiler = shutil.which("c++") or "g++"
    if run([compiler, f"-fsanitize={sanitizer}", source, "-o", program]).returncode:
        return False
    return run([program]).returncode == 0


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_native_tests_under_a_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    if not sanitizer_works(sanitizer, tmp_path):
        pytest.skip(f"-fsanitize={sanitizer} does not work here")
    build = tmp_path / "build"
    # What threads share is the same on every path.
    best = "portable" if sanitizer == "thread" else available_isas()[-1]
    options = [
        "-DCROSSPOOL_BUILD_TESTS=ON",
        f"-DCROSSPOOL_SANITIZE={sanitizer}",
        f"-DCROSSPOOL_KERNEL_PATHS=portable;{best}",
    ]
    for command in (
        ["cmake", "-S", NATIVE, "-B", build, *options],
        ["cmake", "--build", build, "-j", str(len(os.sched_getaffinity(0)))],
        ["ctest", "--test-dir", build, "--output-on-failure"],
    ):
        done = run(command)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert "100% tests passed" in done.stdout
