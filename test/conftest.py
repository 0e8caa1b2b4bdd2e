"""What every test needs before it imports a script."""

from __future__ import annotations

import gc
import sys
import zlib
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(_ROOT / "scripts"), str(_ROOT / "test"), str(_ROOT)]

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leaves what was imported, which stays, out of garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers_every_time(request: pytest.FixtureRequest) -> None:
    """Every test draws its own random tensors, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
