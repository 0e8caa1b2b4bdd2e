"""Every element of every FFN tensor lies on exactly one rank, or on all where it must."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from crosspool.config.deployment import ConfigError
from crosspool.models.registry import attention_tensors, ffn_tensors, read_model
from crosspool.models.spec import ModelSpec
from crosspool.ranks.attention_part import AttentionPart
from crosspool.ranks.ffn_part import FFNPart
from crosspool.weightpool.placement import FFNShard, attention_bytes, place
from make_random_checkpoint import make_random_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = {"moe_intermediate_size": 30, "n_routed_experts": 5, "num_hidden_layers": 3}
    return make_random_checkpoint(
        "deepseek_v3", tmp_path_factory.mktemp("placement") / "v3", overrides
    )


@pytest.fixture(scope="module")
def spec(path: Path) -> ModelSpec:
    return read_model(path)


@pytest.mark.parametrize("parallel", ["tp", "ep"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_shards_cover_everything_once(
    spec: ModelSpec, ranks: int, parallel: Literal["tp", "ep"]
) -> None:
    shards = [FFNShard(rank=rank, ranks=ranks, parallel=parallel) for rank in range(ranks)]
    for layer, ffn in enumerate(spec.ffn):
        for ref in ffn_tensors(spec, layer):
            held = np.zeros(ref.shape, dtype=int)
            for shard in shards:
                if (index := shard.slice(ref, ffn)) is not None:
                    held[index] += 1
            replicated = ref.key in ("router", "router_bias")
            assert (held == (ranks if replicated else 1)).all(), ref.key


@pytest.mark.parametrize("parallel", ["tp", "ep"])
def test_planned_bytes_are_the_bytes_held(
    path: Path, spec: ModelSpec, parallel: Literal["tp", "ep"]
) -> None:
    placement = place([spec, spec], ["a", "b"], 2, 1 << 30, parallel)
    for shard, planned in zip(placement.shards, placement.weight_bytes, strict=True):
        part = FFNPart(spec, path, shard, lambda _: None)
        assert [sum(t.bytes for t in part.tensors())] * 2 == list(planned)
    held = AttentionPart(spec, path, lambda _: None).tensors()
    assert sum(t.bytes for t in held) == attention_bytes(spec)


def test_parts_hold_their_own_tensors_and_no_others(path: Path, spec: ModelSpec) -> None:
    attention = AttentionPart(spec, path, lambda _: None).tensors()
    ffn = FFNPart(spec, path, FFNShard(rank=0, ranks=1, parallel="tp"), lambda _: None).tensors()
    assert {t.name for t in attention} == {ref.name for _, ref in attention_tensors(spec)}
    assert {t.name for t in ffn} == {
        ref.name for layer in range(spec.layers) for ref in ffn_tensors(spec, layer)
    }
    assert not any(".mlp." in t.name for t in attention)
    bias = next(t for t in ffn if t.key == "router_bias")
    assert (bias.dtype, bias.shape, bias.bytes, bias.layer) == ("float32", (5,), 20, 1)


def test_too_small_a_pool_is_refused(spec: ModelSpec) -> None:
    needed = sum(place([spec], ["a"], 1, 1 << 30, "tp").weight_bytes[0])
    place([spec, spec], ["small", "other"], 1, 2 * needed, "tp")
    with pytest.raises(ConfigError) as caught:
        place([spec, spec], ["small", "other"], 1, 2 * needed - 1, "tp")
    for text in ("weight_pool_bytes", "small", "other", str(2 * needed), str(2 * needed - 1)):
        assert text in str(caught.value)
