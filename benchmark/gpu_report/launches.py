"""What the checks of the report launch, to be compiled ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from crosspool.kernels.cuda_loop import LinkMemory
from crosspool.kernels.triton_cache.launches import Launch, recording
from crosspool.models.registry import read_model
from crosspool.models.spec import ModelSpec
from crosspool.ranks.gpu.compile import NOWHERE
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.lanes import make_serving, make_stages
from crosspool.ranks.gpu.links import Crossing, ServedCounts
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.stages import HasStages
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.ranks.weights import TORCH_DTYPES
from crosspool.weightpool.placement import FFNShard

from benchmark.gpu import PAGE_SIZE, pages_of, spec_of
from benchmark.gpu_report.bundled import DEMO, PAGES
from benchmark.gpu_report.platform import Scale


def report_launches(
    scale: Scale, capability: int, models: Sequence[str]
) -> dict[str, list[Launch]]:
    """What the checks of the report launch on a GPU of ``capability`` (90: sm_90), by model."""

    launches = {}
    for name in models:
        with recording(capability) as recorded:
            found = _bundled(scale, name) if name in scale.models else _of_times(scale)
            for stages in found:
                for call in stages.calls.values():
                    call()
        launches[name] = recorded
    return launches


def _bundled(scale: Scale, name: str) -> Iterator[HasStages]:
    """Stages of a bundled model: with all buckets, with each alone, and with those that exchange
    rows with another device."""

    spec = read_model(DEMO / name, dtype="float32")
    model = _hollow(dataclasses.replace(spec, ffn=spec.ffn[: scale.layers]), PAGES)
    for buckets in (scale.buckets, *([bucket] for bucket in scale.buckets)):
        yield from make_stages([model], buckets, 1, buckets[-1], NOWHERE)[1].values()
    links, last = [LinkMemory()], scale.buckets[-1]
    crossing = Crossing(links=(0,), own=None)
    _, stages = make_stages(
        [model], scale.buckets, 1, last, NOWHERE, links=[links], crossings=[crossing]
    )
    yield from stages.values()
    assert model.ffn is not None
    counts = ServedCounts(1, HostSide(NOWHERE))
    _, served = make_serving(
        [model.spec], {0: model.ffn}, scale.buckets, links, NOWHERE, counts=counts, first_lane=1
    )
    yield from served.values()


def _of_times(scale: Scale) -> Iterator[HasStages]:
    """Stages of the model whose times are taken, at each size of a batch."""

    pages = pages_of(scale.batches, scale.context, scale.tokens)
    model = _hollow(spec_of(scale.shape), pages)
    for batch in scale.batches:
        yield from make_stages([model], [batch], 1, batch, NOWHERE)[1].values()


def _hollow(spec: ModelSpec, pages: int) -> GPUModel:
    """A model on a device that has no memory."""

    positions = min(spec.context, pages * PAGE_SIZE)
    kv = torch.empty(
        (pages, spec.layers, PAGE_SIZE, spec.kv_width),
        dtype=TORCH_DTYPES[spec.dtype],
        device=NOWHERE,
    )
    shard = FFNShard(rank=0, ranks=1, parallel="tp")
    return GPUModel(
        spec,
        GPUAttention(spec, None, NOWHERE, positions, lambda _: None),
        GPUFFN(spec, None, shard, NOWHERE, lambda _: None),
        kv,
    )
