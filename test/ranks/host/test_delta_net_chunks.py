"""A prompt's results do not depend on the chunks in which it is computed, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_random_checkpoint import make_random_checkpoint
from support.families import SHAPES
from support.parts import Parts

LENGTH = 45


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_chunks_of_any_length_give_the_same_bits(dtype: str, tmp_path: Path) -> None:
    family, overrides = SHAPES["qwen3-next"]
    path = make_random_checkpoint(family, tmp_path / "c", overrides, dtype)
    parts = Parts(path, pages=512)
    tokens = torch.randint(parts.spec.vocab, (LENGTH,)).tolist()
    whole = parts.step({0: tokens})[0]
    for request, size in enumerate((1, 7, 20), start=1):
        chunks = [tokens[first : first + size] for first in range(0, LENGTH, size)]
        found = [parts.step({request: chunk})[request] for chunk in chunks]
        assert torch.equal(torch.cat(found), whole), size
