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
CHOSEN = "same_bytes or greedy_tokens or every_sampling or bundled or bfloat16 or leases"


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
    assert passed is not None and int(passed[1]) >= 36, done.stdout[-2000:]
