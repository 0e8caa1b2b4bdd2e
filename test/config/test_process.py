"""What every process of a deployment does."""

from __future__ import annotations

import subprocess
import sys


def test_full_collections_leave_out_what_was_there() -> None:
    code = (
        "import gc, msgspec, zmq; from crosspool.config.process import freeze_heap;"
        "before = len(gc.get_objects()); loop = []; loop.append(loop); del loop;"
        "freeze_heap(); left = len(gc.get_objects());"
        "assert before > 10_000 and left < before / 100, (before, left);"
        "loop = []; loop.append(loop); del loop;"
        "assert gc.collect() == 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
