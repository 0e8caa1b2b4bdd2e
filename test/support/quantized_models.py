"""Quantised checkpoints of every family, each by another tool's rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from make_random_checkpoint import make_random_checkpoint
from support import quantized
from support.quantized import Written
from torch import Tensor

_LINEAR = {"targets": ["Linear"]}


def compressed_config(format_: str, ignore: list[str], **weights: Any) -> dict[str, Any]:
    """The ``quantization_config`` of compressed-tensors for one way to store all matrices.
    ``ignore``: modules that stay as they are. ``weights``: fields of QuantizationArgs."""
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": _LINEAR | {"weights": weights}},
        "ignore": ignore,
    }


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
INT8_OF_CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel"}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["gate"]}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}

CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Written]]] = {
    "qwen3 gptq": ("qwen3_moe", GPTQ, quantized.gptq),
    "v3 gptq desc_act": (
        "deepseek_v3",
        GPTQ | {"desc_act": True},
        lambda w: quantized.gptq(w, desc_act=True),
    ),
    "mixtral awq": ("mixtral", AWQ, quantized.awq),
    "v3 fp8": ("deepseek_v3", FP8, quantized.fp8_block),
    "v2 int4": (
        "deepseek_v2",
        compressed_config("pack-quantized", ["re:.*mlp.gate$", "lm_head"], **_INT4),
        lambda w: quantized.compressed(w, "pack-quantized", **_INT4),
    ),
    "olmoe int8": (
        "olmoe",
        compressed_config("int-quantized", ["lm_head"], **INT8_OF_CHANNELS),
        lambda w: quantized.compressed(w, "int-quantized", **INT8_OF_CHANNELS),
    ),
    "glm mxfp4": (
        "glm4_moe_lite",
        compressed_config("mxfp4-pack-quantized", ["lm_head"], **MXFP4),
        lambda w: quantized.compressed(w, "mxfp4-pack-quantized", scale_dtype=torch.uint8, **MXFP4),
    ),
}


def make_quantized(case: str, out: Path) -> tuple[Path, Path]:
    """Writes a quantised checkpoint and one of the floats that it stands for."""
    family, config, write = CASES[case]
    sizes = {"vocab_size": 160, "intermediate_size": 96}
    if family not in ("mixtral", "olmoe"):
        sizes["moe_intermediate_size"] = 96
    path = make_random_checkpoint(family, out / "random", sizes, "float32", seed=3)
    return quantized.quantize_checkpoint(path, out, write, config)
