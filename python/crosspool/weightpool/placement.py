"""Which FFN rank holds which share of which tensor, and whether all of them fit.

A model lies on all FFN ranks or on some of them, and these alone share it.
Tensor-parallel: gate and up projections are cut along their rows, down projections along their
columns, so that a rank's output is a partial sum; routers are on every rank. Expert-parallel:
routed experts go whole to one rank each, in contiguous runs; the rest is as before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

from crosspool.config.errors import ConfigError
from crosspool.models.held_forms import HeldForm, scale_type
from crosspool.models.registry import attention_tensors, ffn_tensors
from crosspool.models.spec import DTYPE_BYTES, FFNSpec, ModelSpec, MoEFFN, TensorRef

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment
    from crosspool.config.device import Device

Index: TypeAlias = tuple[slice, ...]

_GIB = 1 << 30
_JOINED = {"gate": "gate_up", "up": "gate_up"}
"""Tensors that ranks hold as one matrix, whose name this is."""


def _share(size: int, rank: int, ranks: int, unit: int = 1) -> slice:
    """A rank's share of ``size``, cut at multiples of ``unit``."""
    units = -(-size // unit)
    begin, end = units * rank // ranks, units * (rank + 1) // ranks
    return slice(min(begin * unit, size), min(end * unit, size))


@dataclass(frozen=True, kw_only=True)
class FFNShard:
    """One FFN rank's share of every layer of a model."""

    rank: int
    """Place of the rank among the model's FFN ranks."""
    ranks: int
    """Number of FFN ranks that share the model."""
    parallel: Literal["tp", "ep"]
    unit: int = 1
    """Multiple at which intermediate dimensions are cut (:attr:`ModelSpec.cut_unit`)."""

    def experts(self, ffn: MoEFFN) -> range:
        """Routed experts of which this rank holds anything."""
        if self.parallel == "tp":
            return range(ffn.experts)
        share = _share(ffn.experts, self.rank, self.ranks)
        return range(share.start, share.stop)

    def width(self, intermediate: int) -> int:
        """This rank's columns of an intermediate dimension that the ranks share."""
        share = _share(intermediate, self.rank, self.ranks, self.unit)
        return int(share.stop - share.start)

    def slice(self, ref: TensorRef, ffn: FFNSpec) -> tuple[slice, ...] | None:
        """The rank's part of a tensor of a layer of ``ffn``, one slice per dimension with both
        ends given; None when it holds none of it."""
        whole = tuple(slice(0, size) for size in ref.shape)
        if ref.expert is not None and isinstance(ffn, MoEFFN) and self.parallel == "ep":
            return whole if ref.expert in self.experts(ffn) else None
        if ref.once and self.rank != self.ranks - 1:  # the last one holds something of every layer
            return None
        if ref.split is None:
            return whole
        share = _share(ref.shape[ref.split], self.rank, self.ranks, self.unit)
        if share.start == share.stop:
            return None
        return (*whole[: ref.split], share, *whole[ref.split + 1 :])


@dataclass(frozen=True, kw_only=True)
class Placement:
    shards: tuple[dict[int, FFNShard], ...]
    """Shares of the models that lie on each FFN rank, indexed [FFN rank][model]."""
    weight_bytes: tuple[dict[int, int], ...]
    """Bytes that each FFN rank holds of each model, indexed [FFN rank][model]; 0 where it holds
    nothing. Routed experts on demand are not counted."""
    expert_bytes: tuple[dict[int, int], ...]
    """Bytes of each model's routed experts on demand that lie on each FFN rank, indexed likewise,
    in memory or not."""

    attention_bytes: dict[int, int]
    """Bytes of each model's attention part, which each of its attention ranks holds, by the
    model."""

    @property
    def pool_bytes(self) -> int:
        """Bytes of the smallest weight pool that holds everything but routed experts on demand.
        Ranks share the pool evenly, so it gives every rank what the fullest needs."""
        return len(self.weight_bytes) * max(sum(of.values()) for of in self.weight_bytes)

    @property
    def all_expert_bytes(self) -> int:
        """Bytes of the smallest expert pool that holds all routed experts on demand."""
        return len(self.expert_bytes) * max(sum(of.values()) for of in self.expert_bytes)


def holds_codes(deployment: Deployment) -> bool:
    """Whether ranks hold quantised matrices as codes: those of the resident loop on CPUs."""
    return deployment.loop == "resident" and all(device.is_cpu for device in deployment.devices)


def held_form(ref: TensorRef, dtype: str, index: Index) -> HeldForm | None:
    """Returns the codes as which a rank of the resident loop holds a part of a matrix of a model
    of ``dtype``; None where it holds floats. Attention absorbs ``kv_b_proj`` head by head, as
    floats."""
    if ref.scheme is None or ref.key == "kv_b_proj":
        return None
    return ref.scheme.held(index[1].stop - index[1].start, scale_type(dtype))


def held_bytes(ref: TensorRef, spec: ModelSpec, index: Index, codes: bool = False) -> int:
    """Bytes of a part of a tensor in memory. ``codes``: whether ranks hold codes."""
    if codes and (form := held_form(ref, spec.dtype, index)) is not None:
        n, k = (part.stop - part.start for part in index)
        return form.bytes(n, k)
    dtype = "float32" if ref.keep_fp32 else spec.dtype
    elements: int = math.prod(part.stop - part.start for part in index)
    return elements * DTYPE_BYTES[dtype]


@lru_cache(maxsize=1024)  # of many experts, there are many tensors
def ffn_bytes(
    spec: ModelSpec, shard: FFNShard, codes: bool = False, *, experts: bool | None = None
) -> int:
    """Bytes of a model's FFN weights on one rank: of all of them, of its routed experts' matrices
    (``experts`` is true), or of the others. ``codes``: whether ranks hold codes."""
    parts = [
        (layer, ref, index)
        for layer, ffn in enumerate(spec.ffn)
        for ref in ffn_tensors(spec, layer)
        if experts in (None, ref.on_demand) and (index := shard.slice(ref, ffn)) is not None
    ]
    return _held_bytes(spec, parts, codes)


@lru_cache(maxsize=1024)
def attention_bytes(spec: ModelSpec, codes: bool = False) -> int:
    """Bytes of a model's attention part, which is never cut. ``codes``: whether ranks
    hold codes."""
    parts = [
        (layer, ref, tuple(slice(0, size) for size in ref.shape))
        for layer, ref in attention_tensors(spec)
    ]
    return _held_bytes(spec, parts, codes)


def _held_bytes(
    spec: ModelSpec, parts: Sequence[tuple[int | None, TensorRef, Index]], codes: bool
) -> int:
    """Bytes of parts of tensors, with their layers. Tensors that are one matrix are held as floats
    unless all of them have the same codes."""
    forms: defaultdict[tuple[int | None, str], set[HeldForm | None]] = defaultdict(set)
    matrices = [(layer, _matrix_of(ref)) for layer, ref, _ in parts]
    for matrix, (_, ref, index) in zip(matrices, parts, strict=True):
        forms[matrix].add(held_form(ref, spec.dtype, index))
    return sum(
        held_bytes(ref, spec, index, codes and len(forms[matrix]) == 1)
        for matrix, (_, ref, index) in zip(matrices, parts, strict=True)
    )


def _matrix_of(ref: TensorRef) -> str:
    """Names the matrix of its layer that a tensor is, or is a part of."""
    of, _, last = ref.key.rpartition(".")
    return f"{of}.{_JOINED.get(last, last)}"


def place(deployment: Deployment, specs: Mapping[int, ModelSpec]) -> Placement:
    """Shares every model's FFN weights among its FFN ranks. ``specs``: by the model.

    Raises ConfigError for models that can never be served: one that does not fit into a device's
    share of ``weight_pool_bytes`` or ``attention_weight_bytes`` alone, or pinned ones that do not
    fit together."""
    shards: tuple[dict[int, FFNShard], ...] = tuple({} for _ in deployment.weight_pool_devices)
    for model in deployment.models:
        ranks = deployment.ffn_ranks(model)
        for index, rank in enumerate(ranks):
            shards[rank][model] = FFNShard(
                rank=index,
                ranks=len(ranks),
                parallel=deployment.ffn_parallel,
                unit=specs[model].cut_unit,
            )
    codes = holds_codes(deployment)

    def counted(of_rank: dict[int, FFNShard], model: int, experts: bool | None) -> int:
        if model not in of_rank:
            return 0
        return ffn_bytes(specs[model], of_rank[model], codes, experts=experts)

    on_demand = {model: config.experts == "demand" for model, config in deployment.models.items()}
    placement = Placement(
        shards=shards,
        weight_bytes=tuple(
            {
                model: counted(of_rank, model, False if demand else None)
                for model, demand in on_demand.items()
            }
            for of_rank in shards
        ),
        expert_bytes=tuple(
            {
                model: counted(of_rank, model, True) if demand else 0
                for model, demand in on_demand.items()
            }
            for of_rank in shards
        ),
        attention_bytes={
            model: attention_bytes(specs[model], codes) for model in deployment.models
        },
    )
    for room in rooms(deployment, placement):
        _check_room(deployment, room)
    return placement


@dataclass(frozen=True, kw_only=True)
class WeightRoom:
    """What one device has for weights of one pool, and what each model needs of it."""

    option: str
    """Name of the option that sets the pool's bytes."""
    what: str
    """What weights these are."""
    device: Device
    devices: int
    """Number of devices that share the pool's bytes evenly."""
    bytes: int | None
    """Bytes that the device has; None: as many as all models need."""
    needed: Mapping[int, int]
    """Bytes of each model; 0 where the device has no share of it."""

    def holds(self, models: Iterable[int]) -> bool:
        """Whether models fit together."""
        return self.bytes is None or sum(self.needed[model] for model in models) <= self.bytes


def rooms(deployment: Deployment, placement: Placement) -> list[WeightRoom]:
    """Returns the rooms of all devices: those of the weight pool, without what is set aside for
    routed experts on demand, then those for attention weights."""
    weights, kv = deployment.weight_pool_devices, deployment.kv_pool_devices
    pool = deployment.weight_pool_bytes - deployment.expert_pool_bytes
    given = deployment.attention_weight_bytes
    found = [
        WeightRoom(
            option="weight_pool_bytes",
            what="FFN weights",
            device=device,
            devices=len(weights),
            bytes=pool // len(weights),
            needed=needed,
        )
        for device, needed in zip(weights, placement.weight_bytes, strict=True)
    ]
    return found + [
        WeightRoom(
            option="attention_weight_bytes",
            what="attention weights",
            device=device,
            devices=len(kv),
            bytes=None if given is None else given // len(kv),
            needed={
                model: needed if rank in deployment.attention_ranks(model) else 0
                for model, needed in placement.attention_bytes.items()
            },
        )
        for rank, device in enumerate(kv)
    ]


def initially_resident(deployment: Deployment, specs: Mapping[int, ModelSpec]) -> frozenset[int]:
    """Returns the models that are in memory from the start: pinned ones, then, in the order of
    their numbers, each of those on demand for which every device has room left.

    Raises ConfigError as :func:`place` does."""
    found = rooms(deployment, place(deployment, specs))
    chosen = _pinned(deployment)
    for number, model in deployment.models.items():
        if model.keep == "demand" and all(room.holds(chosen | {number}) for room in found):
            chosen.add(number)
    return frozenset(chosen)


def _pinned(deployment: Deployment) -> set[int]:
    return {number for number, model in deployment.models.items() if model.keep == "pinned"}


def _check_room(deployment: Deployment, room: WeightRoom) -> None:
    """Raises ConfigError when a model does not fit alone, or those that are pinned do not fit
    together."""
    if room.bytes is None or not room.needed:
        return
    largest = max(room.needed, key=lambda model: room.needed[model])
    pinned = sorted(_pinned(deployment))
    if not room.holds([largest]):
        models, advice = [largest], ""
    elif not room.holds(pinned):
        models, advice = pinned, ", pin fewer models"
    else:
        return
    needed = sum(room.needed[model] for model in models)
    named = ", ".join(
        f"{deployment.models[model].name} {room.needed[model] / _GIB:.3f} GiB"
        for model in models
        if room.needed[model]
    )
    are = "pinned models" if models == pinned and advice else "model"
    own = "weight_pool_devices" if room.option == "weight_pool_bytes" else "kv_pool_devices"
    elsewhere = f", place models elsewhere with their {own}" if room.devices > 1 else ""
    aside = deployment.expert_pool_bytes if room.option == "weight_pool_bytes" else 0
    beside = f" beside its share of expert_pool_bytes, {aside}" if aside else ""
    raise ConfigError(
        f"{room.option} is too small: the {room.what} on {room.device.name} of the {are} {named} "
        f"need {needed} bytes, and each of the pool's {room.devices} device(s) has {room.bytes}"
        f"{beside}. Raise it to {needed * room.devices + aside}{elsewhere}{advice}, or serve "
        "fewer models"
    )
