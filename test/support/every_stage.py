"""Every stage of the product, small: of models with GQA and with MLA, dense and MoE layers; on a
lane that holds all of them, on one whose FFN parts are elsewhere, and on one that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import crosspool
import torch
from crosspool.kernels.cuda_loop import LinkMemory, ModelStages
from crosspool.models.registry import read_model
from crosspool.models.spec import DTYPE_BYTES
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.lanes import make_serving, make_stages, model_stages
from crosspool.ranks.gpu.links import Crossing, ServedCounts
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.scratch import LaneBuffers
from crosspool.ranks.gpu.stages import HasStages
from crosspool.transport.lane_layout import LINK_HEAD_BYTES, LinkLayout

from benchmark.gpu_lanes import random_model

DEMO = Path(crosspool.__file__).parent / "demo"
NAMES = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")


@dataclass(frozen=True)
class EveryStage:
    """What :func:`crosspool.ranks.gpu.lanes.join_loop` takes."""

    models: Sequence[ModelStages]
    lanes: Sequence[LaneBuffers]
    stages: dict[tuple[int, int, int], HasStages]
    buckets: Sequence[int]
    kept: Sequence[torch.Tensor]
    """Memory of the link."""


def every_stage(host: HostSide, dtype: str, buckets: Sequence[int]) -> EveryStage:
    """``dtype``: of the models' weights, which are random; ``buckets``: rows, ascending."""
    specs = [read_model(DEMO / name, dtype=dtype) for name in NAMES]
    models = [random_model(spec, host.device, pages=16) for spec in specs]
    row_bytes = max(spec.hidden * DTYPE_BYTES[spec.dtype] for spec in specs)
    layout, rows = LinkLayout(buckets[-1], row_bytes), buckets[-1]
    link = torch.zeros(layout.link_bytes, dtype=torch.uint8, device=host.device)
    assert layout.link_bytes > LINK_HEAD_BYTES
    place = LinkMemory(link.data_ptr(), layout.payload_bytes, layout.max_rows, row_bytes)
    away = [GPUModel(model.spec, model.attention, None, model.kv) for model in models]
    crossings = [Crossing(links=(0,), own=None)] * len(models)
    whole, of_whole = make_stages(models, buckets, 1, rows, host.device)
    sending, of_sending = make_stages(
        away, buckets, 1, rows, host.device, links=[[place]], crossings=crossings
    )
    ffns = {i: model.ffn for i, model in enumerate(models) if model.ffn is not None}
    serving, of_serving = make_serving(
        specs, ffns, buckets, [place], host.device, counts=ServedCounts(1, host), first_lane=2
    )
    stages: dict[tuple[int, int, int], HasStages] = {**of_whole, **of_serving}
    stages |= {(1, model, bucket): made for (_, model, bucket), made in of_sending.items()}
    known = [model_stages(spec, Crossing()) for spec in specs]
    return EveryStage(known, [*whole, *sending, *serving], stages, buckets, [link])
