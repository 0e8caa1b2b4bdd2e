"""Quantised checkpoints on the host loop's parts: the logits of transformers' model on the weights
that the quantised ones stand for, with shares cut along groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from crosspool.models.registry import ffn_tensors, read_model
from crosspool.weightpool.placement import FFNShard
from make_random_checkpoint import make_random_checkpoint
from support import quantized
from support.families import reference_model
from support.parts import Parts
from support.quantized import Written
from torch import Tensor

PROMPT, DECODE_STEPS = 19, 32
_LINEAR = {"targets": ["Linear"]}


def _compressed(format_: str, ignore: list[str], **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": _LINEAR | {"weights": weights}},
        "ignore": ignore,
    }


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
_MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}

CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Written]]] = {
    "qwen3 gptq": ("qwen3_moe", _GPTQ, quantized.gptq),
    "v3 gptq desc_act": (
        "deepseek_v3",
        _GPTQ | {"desc_act": True},
        lambda w: quantized.gptq(w, desc_act=True),
    ),
    "mixtral awq": (
        "mixtral",
        {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["gate"]},
        quantized.awq,
    ),
    "v3 fp8": (
        "deepseek_v3",
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        quantized.fp8_block,
    ),
    "v2 int4": (
        "deepseek_v2",
        _compressed("pack-quantized", ["re:.*mlp.gate$", "lm_head"], **_INT4),
        lambda w: quantized.compressed(w, "pack-quantized", **_INT4),
    ),
    "olmoe int8": (
        "olmoe",
        _compressed("int-quantized", ["lm_head"], **_INT8),
        lambda w: quantized.compressed(w, "int-quantized", **_INT8),
    ),
    "glm mxfp4": (
        "glm4_moe_lite",
        _compressed("mxfp4-pack-quantized", ["lm_head"], **_MXFP4),
        lambda w: quantized.compressed(
            w, "mxfp4-pack-quantized", scale_dtype=torch.uint8, **_MXFP4
        ),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    family, config, write = CASES[request.param]
    out = tmp_path_factory.mktemp("quantized")
    sizes = {"vocab_size": 160, "intermediate_size": 96}
    if family not in ("mixtral", "olmoe"):
        sizes["moe_intermediate_size"] = 96
    path = make_random_checkpoint(family, out / "random", sizes, "float32", seed=3)
    return quantized.quantize_checkpoint(path, out, write, config)


@pytest.mark.parametrize(("ranks", "parallel"), [(2, "tp"), (2, "ep")])
@torch.inference_mode()
def test_logits_are_those_of_the_floats(
    folders: tuple[Path, Path], ranks: int, parallel: Literal["tp", "ep"]
) -> None:
    path, floats = folders
    parts = Parts(path, ranks, parallel)
    tokens = torch.randint(
        parts.spec.vocab, (PROMPT + DECODE_STEPS,), generator=torch.Generator().manual_seed(5)
    )
    expected = reference_model(floats, torch.float32)(tokens[None]).logits[0]
    assert expected.std() > 0.3  # else the tolerance would say nothing
    found = [parts.step({0: tokens[:PROMPT].tolist()})[0]]
    found += [parts.step({0: [int(token)]})[0] for token in tokens[PROMPT:]]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-3, rtol=0)


def test_shares_are_cut_along_groups(folders: tuple[Path, Path]) -> None:
    """96 intermediate features in groups of 32, on two ranks: 32 and 64."""
    spec = read_model(folders[0])
    unit = spec.cut_unit
    shards = [FFNShard(rank=rank, ranks=2, parallel="tp", unit=unit) for rank in range(2)]
    free = all(scheme.unit == (1, 1) for _, scheme in _quantization(spec).schemes)
    assert [shard.width(96) for shard in shards] == ([48, 48] if free else [32, 64])
    for ref in ffn_tensors(spec, spec.layers - 1):
        if ref.scheme is None or ref.split is None:
            continue
        for shard in shards:
            index = shard.slice(ref, spec.ffn[-1])
            assert index is not None
            for part, multiple in zip(index, ref.scheme.unit, strict=True):
                assert part.start % multiple == part.stop % multiple == 0


def _quantization(spec: Any) -> Any:
    assert spec.quantization is not None
    return spec.quantization
