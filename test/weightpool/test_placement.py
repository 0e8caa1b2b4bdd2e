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
from crosspool.weightpool.placement import FFNShard, attention_bytes, initially_resident, place
from make_random_checkpoint import make_random_checkpoint

Keep = Literal["pinned", "demand", "asleep"]


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
    *,
    keep: Sequence[Keep] | None = None,
    attention: int | None = None,
) -> Deployment:
    """``ranks`` FFN ranks; ``places``: the ranks of each model, or None for all."""
    return Deployment(
        models={
            index: ModelConfig(
                name=f"model-{index}",
                path="",
                keep="demand" if keep is None else keep[index],
                weight_pool_devices=None if own is None else tuple(Device(f"cpu:{i}") for i in own),
            )
            for index, own in enumerate(places)
        },
        next_model=len(places),
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=tuple(Device(f"cpu:{rank}") for rank in range(ranks)),
        kv_pool_bytes=1 << 30,
        weight_pool_bytes=weight_pool_bytes,
        attention_weight_bytes=attention,
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


def test_a_model_that_fits_nowhere_alone_is_refused(spec: ModelSpec) -> None:
    needed = place(deployment(1, [None]), [spec]).pool_bytes
    place(deployment(1, [None, None], needed), [spec, spec])
    with pytest.raises(ConfigError) as caught:
        place(deployment(1, [None, None], needed - 1), [spec, spec])
    for text in ("weight_pool_bytes", "model-0", f"{needed} bytes", f"has {needed - 1}"):
        assert text in str(caught.value)
    assert "weight_pool_devices" not in str(caught.value)


def test_pinned_models_that_do_not_fit_together_are_refused(spec: ModelSpec) -> None:
    """Two pinned models, each whole on one device of three, need three times their bytes, since the
    pool is shared evenly; what lies on other devices is not to blame."""
    whole = place(deployment(1, [None]), [spec]).pool_bytes
    places = [[1], [0], [1]]
    pinned = ["pinned"] * 3
    placed = place(deployment(3, places), [spec] * 3)
    assert [list(held.values()) for held in placed.weight_bytes] == [
        [0, whole, 0],
        [whole, 0, whole],
        [0, 0, 0],
    ]
    assert placed.pool_bytes == 3 * 2 * whole
    assert place(deployment(3, places, placed.pool_bytes, keep=pinned), [spec] * 3) == placed
    with pytest.raises(ConfigError) as caught:
        place(deployment(3, places, placed.pool_bytes - 1, keep=pinned), [spec] * 3)
    said = str(caught.value)
    for text in ("cpu:1", "model-0", "model-2", f"{2 * whole} bytes", str(6 * whole), "pin fewer"):
        assert text in said
    assert "weight_pool_devices" in said and "model-1" not in said and "cpu:0" not in said
    keep: list[Keep] = ["pinned", "pinned", "demand"]
    place(deployment(3, places, placed.pool_bytes - 1, keep=keep), [spec] * 3)


def test_attention_weights_have_a_bound_of_their_own(spec: ModelSpec) -> None:
    needed = attention_bytes(spec)
    place(deployment(1, [None] * 2, attention=needed), [spec] * 2)
    for keep, attention in ((["demand"] * 2, needed - 1), (["pinned"] * 2, 2 * needed - 1)):
        with pytest.raises(ConfigError, match=f"attention_weight_bytes.*has {attention}"):
            place(deployment(1, [None] * 2, keep=keep, attention=attention), [spec] * 2)


@pytest.mark.parametrize(
    ("keep", "share", "resident"),
    [
        (["demand"] * 4, 4.0, {0, 1, 2, 3}),
        (["demand"] * 4, 3.9, {0, 1, 2}),
        (["demand", "demand", "pinned", "pinned"], 3, {0, 2, 3}),
        (["demand", "asleep", "demand", "demand"], 2, {0, 2}),
        (["asleep"] * 4, 4, set()),
        (["pinned", "asleep", "pinned", "demand"], 2, {0, 2}),
    ],
)
@pytest.mark.parametrize("pool", ["weights", "attention"])
def test_who_is_in_memory_from_the_start(
    spec: ModelSpec, keep: list[Keep], share: float, resident: set[int], pool: str
) -> None:
    """``share``: room for so many of four models."""
    if pool == "weights":
        whole = place(deployment(1, [None]), [spec]).pool_bytes
        given = deployment(1, [None] * 4, int(share * whole), keep=keep)
    else:
        given = deployment(1, [None] * 4, keep=keep, attention=int(share * attention_bytes(spec)))
    assert initially_resident(given, [spec] * 4) == resident


def test_a_model_that_a_fuller_device_has_no_room_for_does_not_keep_others_out(
    spec: ModelSpec,
) -> None:
    whole = place(deployment(1, [None]), [spec]).pool_bytes
    given = deployment(2, [[0], [0], [1]], 2 * whole)
    assert initially_resident(given, [spec] * 3) == {0, 2}
