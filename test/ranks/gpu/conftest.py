"""Tests here run on a GPU (``make test-gpu``), and by test/ranks/test_gpu_interpreted.py in
Triton's interpreter, on CPU tensors, but for those that are marked ``gpu`` themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from support.triton_interpreter import repair

    repair()
else:
    # CUDA reads them when it is loaded: no kernel is loaded later, behind a resident loop, and no
    # stream shares a connection with one.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not INTERPRETED and here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def _needs_a_gpu() -> None:
    """Skips before a fixture of a module computes what a test would compare with."""
    import torch

    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU (interpreted: test/ranks/test_gpu_interpreted.py)")
