"""What every test needs before it imports transformers' models or a script."""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from pathlib import Path

import pytest
import torch
from crosspool.frontend import compat

_ROOT = Path(__file__).parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not torch.cuda.is_available():
    # Before any kernel is made: without a GPU they are interpreted, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(_ROOT / "scripts"), str(_ROOT / "test"), str(_ROOT)]

if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    from support import triton_interpreter

    triton_interpreter.repair()
compat.install()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_every_time(request: pytest.FixtureRequest) -> None:
    """Every test draws its own random tensors, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
