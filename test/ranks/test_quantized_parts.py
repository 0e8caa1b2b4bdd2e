"""Quantised checkpoints on the host loop's parts: the logits of transformers' model on the weights
that the quantised ones stand for, with shares cut along groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from crosspool.models.registry import ffn_tensors, read_model
from crosspool.weightpool.placement import FFNShard
from support.parts import Parts, assert_logits_of_floats
from support.quantized_models import CASES, make_quantized


@pytest.fixture(scope="module", params=CASES)
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    return make_quantized(request.param, tmp_path_factory.mktemp("quantized"))


@pytest.mark.parametrize(("ranks", "parallel"), [(2, "tp"), (2, "ep")])
def test_logits_are_those_of_the_floats(
    folders: tuple[Path, Path], ranks: int, parallel: Literal["tp", "ep"]
) -> None:
    path, floats = folders
    assert_logits_of_floats(Parts(path, ranks, parallel), floats)


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
