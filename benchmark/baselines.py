"""The placements that are compared: CrossPool, static partition and monolithic serving, all of them
deployments of the same server on devices of the same memory (docs/baselines.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crosspool.config.deployment import ModelConfig
from crosspool.models.registry import spec_of
from crosspool.weightpool.placement import FFNShard, attention_bytes, ffn_bytes

Way = Literal["static", "monolithic_cut", "monolithic_whole", "crosspool"]
WAYS: tuple[Way, ...] = ("static", "monolithic_cut", "monolithic_whole", "crosspool")
TITLES: Mapping[str, str] = {
    "static": "static partition",
    "monolithic_cut": "monolithic, cut",
    "monolithic_whole": "monolithic, whole",
    "crosspool": "CrossPool",
}
CHUNK_BYTES = 2 << 20
LEAST_KV_BYTES = 64 << 20
"""KV memory of a device that has all models whole."""


@dataclass(frozen=True)
class Weights:
    """Bytes of one model's weights."""

    attention: int
    ffn: int
    shared_ffn: int
    """FFN bytes of the fullest device where all devices share them."""

    @property
    def whole(self) -> int:
        return self.attention + self.ffn


def weights_of(folder: Path, devices: int) -> Weights:
    """Return what a model's weights take in memory, whole and cut over ``devices``."""
    spec = spec_of(ModelConfig(name=folder.name, path=str(folder)))

    def ffn(ranks: int) -> int:
        return max(
            ffn_bytes(
                spec, FFNShard(rank=rank, ranks=ranks, parallel="tp", unit=spec.cut_unit), True
            )
            for rank in range(ranks)
        )

    return Weights(attention_bytes(spec, True), ffn(1), ffn(devices))


def device_bytes(weights: Sequence[Weights]) -> int:
    """Return the memory of a device: the least on which every placement can serve, which is what
    all models take whole and some KV memory."""
    return sum(model.whole for model in weights) + LEAST_KV_BYTES


def kv_bytes(way: Way, weights: Sequence[Weights], devices: int) -> int:
    """Return the KV memory, over all devices of the KV pool, that weights leave."""
    memory = device_bytes(weights)
    attention = sum(model.attention for model in weights)
    left = {
        "static": memory - max(model.whole for model in weights),
        "monolithic_cut": memory - attention - sum(model.shared_ffn for model in weights),
        "monolithic_whole": memory - sum(model.whole for model in weights),
        "crosspool": memory - attention,
    }[way]
    ranks = 1 if way == "crosspool" else devices
    return ranks * (left // CHUNK_BYTES) * CHUNK_BYTES


def names_of(way: Way, folders: Sequence[Path], devices: int) -> dict[str, list[str]]:
    """Return the names under which each model is served, by the folder's name. Clients take turns
    among several."""
    if way == "monolithic_whole":
        return {path.name: [f"{path.name}-on-{n}" for n in range(devices)] for path in folders}
    return {path.name: [path.name] for path in folders}


def deployment(
    way: Way, folders: Sequence[Path], devices: Sequence[str], kv_pool_bytes: int
) -> dict[str, Any]:
    """Return the deployment file of a placement of models on devices. Static partition needs a
    device for each model, and CrossPool has two devices, one for each pool."""
    every = list(devices)
    models = [
        {"path": str(folder), "name": name}
        for folder in folders
        for name in names_of(way, folders, len(every))[folder.name]
    ]
    if way in ("static", "monolithic_whole"):
        for index, model in enumerate(models):
            own = every[index % len(every)]
            model |= {"kv_pool_devices": own, "weight_pool_devices": own}
    split = way == "crosspool"
    return {
        "models": models,
        "kv_pool_devices": every[:1] if split else every,
        "weight_pool_devices": every[1:] if split else every,
        "kv_pool_bytes": kv_pool_bytes,
        "chunk_bytes": CHUNK_BYTES,
        "lanes": max(2, len(folders)),
    }
