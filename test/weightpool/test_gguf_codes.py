"""Codes of GGUF's blocks stand for the floats that ``gguf`` makes of them."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from crosspool.models.gguf_blocks import GGUF_BLOCKS
from crosspool.weightpool.gguf_codes import coded_blocks
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from support.gguf_files import blocks

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
TABLES = {
    "int4": torch.arange(16.0) - 8,
    "uint4": torch.arange(16.0),
    "e2m1": torch.cat((_E2M1, -_E2M1)),
    "int6": torch.arange(64.0) - 32,
    "uint6": torch.arange(64.0),
    "int8": torch.cat((torch.arange(128.0), torch.arange(-128.0, 0))),
}


@pytest.mark.parametrize("scales", ["float32", "float16"])
@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_codes_stand_for_the_floats(kind: str, scales: str) -> None:
    random = np.random.default_rng(7)
    values = random.normal(size=(6, 512)).astype(np.float32)
    stored = blocks(values, kind)
    expected = torch.from_numpy(dequantize(stored, Type[kind]).reshape(6, 512))
    _, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    form = GGUF_BLOCKS[kind].held
    if form.codes != "e2m1":
        form = dataclasses.replace(form, scales=scales)
    for columns in (slice(0, 512), slice(96, 320)):
        coded = coded_blocks(stored.reshape(6, -1, size), kind, form, columns)
        assert str(coded.scales.dtype) == f"torch.{form.scales}"
        of = torch.arange(columns.stop - columns.start) // form.group
        found = TABLES[form.codes][coded.codes.long()] * coded.scales.float()[:, of]
        if coded.offsets is not None:
            assert form.offset == "minimum"
            found -= coded.offsets.float()[:, of]
        tolerance = 1e-6 if form.scales != "float16" else 1e-3
        bound = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found, expected[:, columns], atol=bound, rtol=0)
