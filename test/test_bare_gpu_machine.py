"""What ``make test-gpu`` and ``make bench-gpu`` run needs no more than a GPU machine has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.packages import installed

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "python"), str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH", "")]
    ),
    "CUDA_VISIBLE_DEVICES": "",
}

pytestmark = pytest.mark.skipif(not installed("triton"), reason="triton is not installed")


def gpu_tests() -> list[str]:
    """Test files as the Makefile finds them."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", "native-gpu", "test-gpu"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    return [word for word in shown.split() if word.startswith("test/")]


def test_gpu_tests_are_collected_without_what_is_missing_there() -> None:
    paths = gpu_tests()
    assert "test/ranks/gpu" in paths and "test/kernels/gpu" in paths, paths
    # Run, not only collected: without a GPU each says by itself what it needs.
    command = [sys.executable, "-m", "pytest", "-p", "support.bare_machine", "-rs", "-m", "gpu"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *paths],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 5), done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) skipped", done.stdout)[-1]) > 10, done.stdout[-2000:]
    assert "msgspec is not installed" in done.stdout, done.stdout[-3000:]


def test_the_benchmark_starts_there() -> None:
    hidden = "import support.bare_machine, runpy, sys; sys.argv = ['gpu', '--help'];"
    run = "runpy.run_module('benchmark.gpu', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"{hidden} {run}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "--models" in done.stdout, done.stderr
