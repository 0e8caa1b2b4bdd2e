"""What every test needs before it imports transformers' models or a script."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from crosspool.frontend import compat

_ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(_ROOT / "scripts"), str(_ROOT / "test"), str(_ROOT)]

compat.install()
torch.set_num_threads(1)
