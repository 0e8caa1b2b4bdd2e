"""Checkpoints whose headers are right and whose bytes are nowhere: sparse files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from crosspool.models.registry import attention_tensors, ffn_tensors, read_model
from crosspool.models.spec import TensorRef

Change = Callable[[TensorRef], TensorRef | None]


def hollow_weights(
    folder: Path, change: Change = lambda ref: ref, dtype: Literal["BF16", "F16"] = "BF16"
) -> None:
    """Writes zeros for every tensor that the folder's config.json asks for. ``change`` may alter a
    tensor, or leave it out by returning None."""
    spec = read_model(folder)
    asked = [ref for _, ref in attention_tensors(spec)]
    asked += [ref for layer in range(spec.layers) for ref in ffn_tensors(spec, layer)]
    header, end = {}, 0
    for ref in filter(None, map(change, asked)):
        begin, end = end, end + 2 * math.prod(ref.shape)
        header[ref.name] = {"dtype": dtype, "shape": ref.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
