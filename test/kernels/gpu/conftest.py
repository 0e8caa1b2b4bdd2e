"""Each test here runs twice: on a GPU (``pytest -m gpu test/kernels/gpu``), and where it is not
itself marked ``gpu``, by test/kernels/test_triton.py in Triton's interpreter, on CPU tensors. Where
Triton cannot be imported, none of them is collected."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from support.triton_interpreter import check_bounds, repair

    repair()
    check_bounds()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        on_device = "device" in getattr(item, "fixturenames", ())
        if not INTERPRETED and on_device and here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """The device on which the kernels run."""
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU (the interpreter's run: test/kernels/test_triton.py)")
    return torch.device("cuda")
