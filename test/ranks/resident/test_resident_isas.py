"""The resident loop's own tests again, with every ISA path forced that this machine has and would
not choose by itself: what a machine without the better ones does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from crosspool.kernels.isa import available_isas, default_isa

TESTS = [
    Path(__file__).with_name(f"test_{name}.py") for name in ("resident_executor", "kept_weights")
]
GREEDY = "greedy_tokens and (core or TP)"
"""In a placement in which matrices are whole, and in one in which they are cut."""
CHOSEN = f"same_bytes or every_sampling or bundled or bfloat16 or leases or {GREEDY}"


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in available_isas() if isa != default_isa()])
def test_a_forced_path_passes_the_same_tests(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", CHOSEN],
        env=os.environ | {"CROSSPOOL_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 33, done.stdout[-2000:]
