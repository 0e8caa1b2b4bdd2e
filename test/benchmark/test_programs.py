"""The native programs of the benchmarks are built with what the engine is made of today."""

from __future__ import annotations

import os
import shutil

import pytest

from benchmark.programs import build


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
@pytest.mark.parametrize(
    "name", ["kernel_benchmark", "hand_over", "network", "bandwidth", "barrier", "instructions"]
)
def test_it_is_built(name: str) -> None:
    assert os.access(build(name), os.X_OK)
