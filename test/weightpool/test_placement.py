"""Every element of every FFN tensor lies on exactly one rank, or on all where it must."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from crosspool.config.deployment import ConfigError, Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.models.registry import attention_tensors, ffn_tensors, read_model
from crosspool.models.spec import ModelSpec
from crosspool.ranks.host.attention import AttentionPart
from crosspool.ranks.host.ffn import FFNPart
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


def deployment(
    ranks: int,
    places: Sequence[Sequence[int] | None],
    weight_pool_bytes: int = 1 << 30,
    ffn_parallel: Literal["tp", "ep"] = "tp",
) -> Deployment:
    """``ranks`` FFN ranks; ``places``: the ranks of each model, or None for all."""
    return Deployment(
        models=tuple(
            ModelConfig(
                name=f"model-{index}",
                path="",
                weight_pool_devices=None if own is None else tuple(Device(f"cpu:{i}") for i in own),
            )
            for index, own in enumerate(places)
        ),
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=tuple(Device(f"cpu:{rank}") for rank in range(ranks)),
        kv_pool_bytes=1 << 30,
        weight_pool_bytes=weight_pool_bytes,
        ffn_parallel=ffn_parallel,
    )


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
    """Model 0 lies on all FFN ranks, model 1 on the last two alone, cut in two."""
    placement = place(deployment(3, [None, [1, 2]], ffn_parallel=parallel), [spec, spec])
    assert [list(of_rank) for of_rank in placement.shards] == [[0], [0, 1], [0, 1]]
    assert [(s.rank, s.ranks) for s in (of[0] for of in placement.shards)] == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]
    assert [(s.rank, s.ranks) for s in (of[1] for of in placement.shards[1:])] == [(0, 2), (1, 2)]
    for shards, planned in zip(placement.shards, placement.weight_bytes, strict=True):
        for model in (0, 1):
            held = 0
            if model in shards:
                part = FFNPart(spec, path, shards[model], lambda _: None)
                held = sum(t.bytes for t in part.tensors())
            assert held == planned[model]
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
    needed = place(deployment(1, [None]), [spec]).pool_bytes
    place(deployment(1, [None, None], 2 * needed), [spec, spec])
    with pytest.raises(ConfigError) as caught:
        place(deployment(1, [None, None], 2 * needed - 1), [spec, spec])
    for text in ("weight_pool_bytes", "model-0", "model-1", str(2 * needed), str(2 * needed - 1)):
        assert text in str(caught.value)
    assert "weight_pool_devices" not in str(caught.value)


def test_the_device_that_is_too_full_is_named(spec: ModelSpec) -> None:
    """Two models, each whole on one device of three, need three times their bytes, since the
    pool is shared evenly; what lies on other devices is not to blame."""
    whole = place(deployment(1, [None]), [spec]).pool_bytes
    places = [[1], [0], [1]]
    placed = place(deployment(3, places), [spec] * 3)
    assert placed.weight_bytes == ((0, whole, 0), (whole, 0, whole), (0, 0, 0))
    assert placed.pool_bytes == 3 * 2 * whole
    assert place(deployment(3, places, placed.pool_bytes), [spec] * 3) == placed
    with pytest.raises(ConfigError) as caught:
        place(deployment(3, places, placed.pool_bytes - 1), [spec] * 3)
    said = str(caught.value)
    for text in ("cpu:1", "model-0", "model-2", f"{2 * whole} bytes", str(6 * whole)):
        assert text in said
    assert "weight_pool_devices" in said and "model-1" not in said and "cpu:0" not in said
