"""GGUF files on the host loop's parts: the logits of transformers' model on the floats that the
blocks stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from support.families import reference_model
from support.gguf_models import CASES, make_gguf
from support.parts import Parts

PROMPT, DECODE_STEPS = 19, 32


@pytest.fixture(scope="module", params=CASES)
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    return make_gguf(request.param, tmp_path_factory.mktemp("gguf"))


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
