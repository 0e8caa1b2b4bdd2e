"""Whole steps of a GPU in Triton's interpreter, which must be chosen before triton is imported and
would change it for every other test: hence a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.packages import installed


@pytest.mark.skipif(not installed("triton"), reason="triton is not installed")
def test_steps_in_the_interpreter() -> None:
    tests = Path(__file__).parent / "gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
