"""Checkpoints whose headers are right and whose bytes are nowhere: sparse files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from crosspool.models.registry import attention_tensors, ffn_tensors, read_model
from crosspool.models.schemes import Stored
from crosspool.models.spec import TensorRef

_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "I32": 4,
    "I64": 8,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
}
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
        stored: dict[str, tuple[str, tuple[int, ...]]] = {ref.name: (dtype, ref.shape)}
        if isinstance(ref.scheme, Stored):
            n, k = ref.shape
            tensors = ref.scheme.stored(ref.module, n, k, ref.stack).values()
            stored = {one.names[0]: (one.dtypes[-1], one.shapes[0]) for one in tensors}
        for name, (kind, shape) in stored.items():
            begin, end = end, end + _BYTES[kind] * math.prod(shape)
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
