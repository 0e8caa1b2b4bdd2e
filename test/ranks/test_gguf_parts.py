"""GGUF files on the host loop's parts: the logits of transformers' model on the floats that the
blocks stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from support.gguf_models import CASES, make_gguf
from support.parts import Parts, assert_logits_of_floats


@pytest.fixture(scope="module", params=CASES)
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    return make_gguf(request.param, tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "tp"), (2, "tp"), (2, "ep")])
def test_logits_are_those_of_the_floats(
    paths: tuple[Path, Path], ranks: int, parallel: Literal["tp", "ep"]
) -> None:
    path, floats = paths
    assert_logits_of_floats(Parts(path, ranks, parallel, dtype="float32"), floats)
