"""GGUF files on the host loop's parts: the logits of transformers' model on the floats that the
blocks stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from make_random_checkpoint import make_random_checkpoint
from support import gguf_files
from support.families import reference_model
from support.parts import Parts

PROMPT, DECODE_STEPS = 19, 32
_K = {"hidden_size": 256, "intermediate_size": 512}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, str], dict[str, Any]]] = {
    # As llama.cpp mixes them for Q4_K_M: by part and role.
    "qwen3 mixed": (
        "qwen3_moe",
        _K | {"moe_intermediate_size": 512, "head_dim": 64},
        {"ffn_down": "Q6_K", "attn_v": "Q6_K", "attn_k": "Q5_K", "output": "Q8_0", "": "Q4_K"},
        {},
    ),
    "mixtral": ("mixtral", {}, {"token_embd": "F16", "ffn_down": "Q8_0", "": "Q4_0"}, {}),
    "olmoe split": ("olmoe", {}, {"token_embd": "BF16", "": "Q8_0"}, {"max_tensors": 11}),
    "v2": (
        "deepseek_v2",
        {"kv_lora_rank": 32, "qk_nope_head_dim": 32},
        {"": "Q8_0"},
        {"split_kv_b": True},
    ),
    "v3 whole kv_b": ("deepseek_v3", {}, {"ffn": "MXFP4", "": "Q8_0"}, {"split_kv_b": False}),
}


@pytest.fixture(scope="module", params=CASES)
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    family, overrides, kinds, options = CASES[request.param]
    out = tmp_path_factory.mktemp("gguf")
    path = make_random_checkpoint(
        family, out / "random", {"vocab_size": 160} | overrides, "float32", seed=3
    )

    def kind_of(name: str) -> str:
        return next(kind for part, kind in kinds.items() if part in name)

    return gguf_files.convert(path, out / "made", kind_of, **options)


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "tp"), (2, "tp"), (2, "ep")])
@torch.inference_mode()
def test_logits_are_those_of_the_floats(
    paths: tuple[Path, Path], ranks: int, parallel: Literal["tp", "ep"]
) -> None:
    path, floats = paths
    parts = Parts(path, ranks, parallel, dtype="float32")
    tokens = torch.randint(
        parts.spec.vocab, (PROMPT + DECODE_STEPS,), generator=torch.Generator().manual_seed(5)
    )
    expected = reference_model(floats, torch.float32)(tokens[None]).logits[0]
    assert expected.std() > 0.3  # else the tolerance would say nothing
    found = [parts.step({0: tokens[:PROMPT].tolist()})[0]]
    found += [parts.step({0: [int(token)]})[0] for token in tokens[PROMPT:]]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-3, rtol=0)
