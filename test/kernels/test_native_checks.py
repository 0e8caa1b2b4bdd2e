"""Builds the native check of the kernels under AddressSanitizer, AMX's tiles emulated as well, and
runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"


@pytest.mark.slow
def test_kernels_under_address_sanitizer(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    options = ["-DCROSSPOOL_BUILD_TESTS=ON", "-DCROSSPOOL_SANITIZE=address"]
    subprocess.run([cmake, "-S", NATIVE, "-B", tmp_path, *options], check=True, timeout=120)
    build = [cmake, "--build", tmp_path, "--target", "kernels_check", "-j2"]
    subprocess.run(build, check=True, timeout=1200)
    # Beside an interposed allocator the sanitizer would refuse to start.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [tmp_path / "test" / "kernels_check"],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "portable" in done.stdout
