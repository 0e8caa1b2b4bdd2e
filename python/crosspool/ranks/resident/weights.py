"""What a device of the resident loop holds of all models, in memory or as files of packed
weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crosspool.config.deployment import Deployment
from crosspool.ranks.resident.attention import PackedAttention
from crosspool.ranks.resident.ffn import PackedFFN
from crosspool.ranks.resident.holder import HolderLink
from crosspool.ranks.resident.kept_weights import WeightKeeper
from crosspool.ranks.resident.reading import SleepingPart
from crosspool.ranks.weights import HeldModel
from crosspool.weightpool.gguf_checkpoint import open_checkpoint
from crosspool.weightpool.packed_cache import PackedCache, Unusable, folder_of

log = logging.getLogger(__name__)

PackedPart = PackedAttention | PackedFFN


@dataclass(frozen=True)
class ResidentWeights:
    """What a device holds of all models, in packed form. Forked processes share it."""

    attention: dict[int, PackedAttention]
    """Those of the models that lie on the attention rank."""
    ffn: dict[int, PackedFFN]
    """Those of the models that lie on the FFN rank."""
    sleeping: dict[int, list[SleepingPart]]
    """By model, the parts that can be read again; empty where packed weights are not kept."""
    holder: HolderLink | None = None
    """The way to the process that holds the weights, if that is another one."""

    def declare(self, held: HeldModel, positions: int, keeper: WeightKeeper | None) -> None:
        """Adds the device's part of a model, without its weights. ``positions``: tokens of the
        longest sequence that may come. Raises ConfigError when the checkpoint cannot be read."""
        if held.attention:
            self.attention[held.index] = PackedAttention(held.spec, held.path, positions)
        if held.ffn is not None:
            self.ffn[held.index] = PackedFFN(
                held.spec, held.path, held.ffn, on_demand=held.experts_on_demand
            )
        if keeper is None:
            return
        checkpoint = open_checkpoint(held.path)
        sleeping = self.sleeping[held.index] = []
        for part in self.parts(held.index):
            kept, key = keeper.of(file_name(held.path, part)), part.weights.form(checkpoint).key()
            kept.touch(key)  # so that it is not given up for others
            sleeping.append(SleepingPart(part, kept, key))

    def merge(self, further: ResidentWeights) -> None:
        """Takes the parts of further models."""
        self.attention.update(further.attention)
        self.ffn.update(further.ffn)
        self.sleeping.update(further.sleeping)

    def forget(self, model: int) -> None:
        """Gives back everything of a model, of which the loop reads nothing any more."""
        for part in self.parts(model):
            part.close()
        self.attention.pop(model, None)
        self.ffn.pop(model, None)
        self.sleeping.pop(model, None)

    @property
    def models(self) -> set[int]:
        """The models of which the device holds a part, with its weights or without."""
        return {*self.attention, *self.ffn}

    def parts(self, model: int) -> list[PackedPart]:
        """The device's parts of a model."""
        of_ranks: tuple[Mapping[int, PackedPart], ...] = (self.attention, self.ffn)
        return [parts[model] for parts in of_ranks if model in parts]

    def drop(self, model: int) -> None:
        """Gives the memory of a model back."""
        for part in self.parts(model):
            part.weights.arena.drop()

    def serve(self, holder: HolderLink) -> None:
        """Drops what device processes have given up: for the process that holds the weights."""
        holder.serve(self.drop)

    def close(self) -> None:
        """Gives the memory back, after the loop that reads it was closed."""
        for attention in self.attention.values():
            attention.close()
        for ffn in self.ffn.values():
            ffn.close()


def file_name(path: Path, part: PackedPart) -> str:
    """How the name of the file begins that keeps a part of the checkpoint in ``path``."""
    return f"{path.name}-{part.role}"


def keeper_of(deployment: Deployment) -> WeightKeeper | None:
    """Packed weights that outlive this process; None where none shall be, or can be."""
    if not deployment.packed_cache_bytes:
        return None
    try:
        folder = folder_of(deployment)
        began_ns = deployment.file.stat().st_mtime_ns
        return WeightKeeper(PackedCache(folder, deployment.packed_cache_bytes, began_ns))
    except Unusable as error:
        log.warning("packed weights are not kept: %s", error)
        return None
