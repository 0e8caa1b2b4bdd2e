"""Counts the weights of a model that CPUs hold as codes (docs/decisions/0010-formats.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import ConfigFile
from crosspool.models.gguf_blocks import GGUF_BLOCKS, Blocks
from crosspool.models.quantization import read_quantization
from crosspool.models.registry import family_of, read_spec
from crosspool.models.schemes import GPTQ, MXFP4, Elements, Names, Quantization, Scheme
from crosspool.planner.shapes.shape import ModelShape
from crosspool.weightpool.placement import FFNShard, attention_bytes, ffn_bytes

_SCHEMES: dict[str, Scheme] = {
    "int4": GPTQ(bits=4, block=(1, 128)),
    "int8": Elements(values="int8", block=(1, None)),
    "mxfp4": MXFP4(),
    **{
        name: Blocks(bits=kind.bits, block=(1, kind.block), type=name)
        for name, kind in GGUF_BLOCKS.items()
    },
}
WEIGHT_FORMATS = tuple(_SCHEMES)
"""Formats in which all matrices but embeddings, routers and LM head can be counted: int4 in groups
of 128 with zero points, as GPTQ and AWQ have them, int8 with a scale for each row, and others by
their names."""


def held_shape(shape: ModelShape, file: Path, format_: str | None) -> ModelShape:
    """Returns the shape with the bytes of its codes. ``file``: the config.json that it was read
    from. ``format_``: one of :data:`WEIGHT_FORMATS`; None: what the config says.

    Raises ConfigError for a model of a family that the server does not run, when a format is asked
    for, and for a quantisation that the server does not read."""
    config = ConfigFile(file).language_part()
    family = family_of(config)
    if family is None:
        if format_ is None:
            return shape
        raise ConfigError(
            f"{shape.id}: how its weights are held in {format_} is not known, since the server "
            "does not run models of its family"
        )
    quantization = read_quantization(config)
    if format_ is not None:
        schemes = ((None, _SCHEMES[format_]),)
        quantization = Quantization(method=format_, schemes=schemes, plain=Names())
    if quantization is None:
        return shape
    spec = read_spec(config, family, "float32" if shape.dtype_bytes > 2 else "bfloat16")
    spec = replace(spec, quantization=quantization)
    return msgspec.structs.replace(
        shape,
        held_attention_bytes=attention_bytes(spec, codes=True),
        held_ffn_bytes=ffn_bytes(spec, FFNShard(rank=0, ranks=1, parallel="tp"), codes=True),
    )
