"""The resident loop with weights that are held as codes: the tokens of the host loop, which
multiplies the floats that they stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from crosspool.kernels import native_structs as ns
from crosspool.models.registry import read_model
from crosspool.ranks.resident.attention import PackedAttention
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.weightpool.placement import FFNShard, attention_bytes, ffn_bytes
from make_random_checkpoint import make_random_checkpoint
from support import quantized
from support.gguf_models import CASES as GGUF_CASES
from support.gguf_models import make_gguf
from support.machine import CORES, Machine, Stream
from support.quantized_models import CASES, make_quantized

FIRST, SECOND = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one device": {},
    "two FFN ranks, TP": {"kv": FIRST, "weights": [FIRST, SECOND]},
    "two FFN ranks, EP": {"kv": FIRST, "weights": [FIRST, SECOND], "ffn_parallel": "ep"},
}
FLOATS = ("v3 gptq desc_act",)
"""Cases whose matrices are held as floats."""
PLAIN_ATTENTION = ("gpt-oss mxfp4",)
"""Cases of which only the experts are quantised."""


@pytest.fixture(scope="module", params=[*CASES, *(f"gguf {name}" for name in GGUF_CASES)])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    name, folder = str(request.param), tmp_path_factory.mktemp("quantized")
    if name in CASES:
        return name, make_quantized(name, folder)[0]
    return name, make_gguf(name.removeprefix("gguf "), folder)[0]


def _generated(
    loop: Literal["host", "resident"], path: Path, of: list[Stream], **fields: Any
) -> list[list[int]]:
    copies = [dataclasses.replace(s, output=[], results=[], pages=[]) for s in of]
    with Machine([path], loop=loop, dtype="float32", **fields) as machine:
        machine.generate(copies, 1)
    return [stream.output for stream in copies]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_are_those_of_the_host_loop(case: tuple[str, Path], placement: str) -> None:
    """Prompts of more and of fewer rows than those whose weights are expanded, and decode."""
    random = np.random.default_rng(3)
    prompts = [[int(token) for token in random.integers(0, 160, n)] for n in (40, 1, 8, 30)]
    streams = [Stream(0, prompt, 14, chunk=26) for prompt in prompts]
    path = case[1]
    expected = _generated("host", path, streams)
    assert _generated("resident", path, streams, **PLACEMENTS[placement]) == expected


@pytest.mark.parametrize("quantization", ["int4", "int8", "fp8"])
def test_floats_that_are_rounded_have_the_tokens_of_the_host_loop(
    quantization: str, tmp_path: Path
) -> None:
    path = make_random_checkpoint(
        "deepseek_v2", tmp_path / "random", {"vocab_size": 160}, "float32"
    )
    random = np.random.default_rng(3)
    streams = [Stream(0, random.integers(0, 160, n).tolist(), 14) for n in (40, 3)]
    plain = _generated("host", path, streams)
    expected = _generated("host", path, streams, quantization=quantization)
    assert expected != plain or quantization == "int8"
    placement = PLACEMENTS["two FFN ranks, TP"]
    found = _generated("resident", path, streams, quantization=quantization, **placement)
    assert found == expected


def test_matrices_are_held_as_codes(case: tuple[str, Path]) -> None:
    name, path = case
    spec = read_model(path, dtype="float32")
    shard = FFNShard(rank=0, ranks=1, parallel="tp", unit=spec.cut_unit)
    for part in (PackedAttention(spec, path, 64), PackedFFN(spec, path, shard)):
        image = part.weights.image()
        grouped = [matrix for matrix in image.matrices if matrix.encoding == ns.GROUPED]
        whole = name in PLAIN_ATTENTION and part.role == "attention"
        assert bool(grouped) == (name not in FLOATS and not whole)
        planned = (
            ffn_bytes(spec, shard, True) if part.role == "ffn" else attention_bytes(spec, True)
        )
        assert _bytes(part) == planned
        if part.role == "ffn" and grouped:
            routers = sum(hasattr(ffn, "router") for ffn in spec.ffn)
            assert len(grouped) == len(image.matrices) - routers
            floats = sum(matrix.n * matrix.k * 4 for matrix in grouped)
            bytes_ = any(word in name for word in ("int8", "fp8", "gguf"))
            bits = 10 if bytes_ else 8
            assert sum(matrix.bytes for matrix in grouped) < floats * bits / 32
        part.close()


def test_gate_and_up_of_different_forms_are_held_and_planned_as_floats(
    tmp_path: Path,
) -> None:
    plain = ["gate", "k_proj", "up_proj", "lm_head"]
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "modules_to_not_convert": ["gate", "k_proj", "up_proj"],
    }
    path = make_random_checkpoint("qwen3_moe", tmp_path / "random", {}, "float32")
    path, _ = quantized.quantize_checkpoint(
        path, tmp_path / "made", quantized.awq, config, ["embed_tokens", *plain]
    )
    spec = read_model(path)
    shard = FFNShard(rank=0, ranks=1, parallel="tp", unit=spec.cut_unit)
    attention, ffn = PackedAttention(spec, path, 64), PackedFFN(spec, path, shard)
    assert _bytes(attention) == attention_bytes(spec, True)
    assert _bytes(ffn) == ffn_bytes(spec, shard, True)
    held = {listing.key: listing.dtype for listing in attention.weights.listing}
    assert [held[f"{key}_proj"] for key in "qkvo"] == ["uint4", "float32", "uint4", "uint4"]
    attention.close()
    ffn.close()


def _bytes(part: PackedAttention | PackedFFN) -> int:
    return sum(listing.bytes for listing in part.weights.listing)
