"""Can the device launch what is captured? Every stage is instantiated by itself, so that one that is
refused has a name, and the others are tried all the same."""

from __future__ import annotations

from collections import Counter

import torch
from crosspool.kernels.cuda_loop import CudaLoopError, LinkMemory
from crosspool.models.spec import DTYPE_BYTES
from crosspool.ranks.gpu.lanes import make_serving, make_stages, model_stages
from crosspool.ranks.gpu.links import Crossing, ServedCounts
from crosspool.ranks.gpu.scratch import LaneBuffers
from crosspool.ranks.gpu.stages import HasStages
from crosspool.transport.lane_layout import LinkLayout

from benchmark.gpu_report.bundled import load
from benchmark.gpu_report.notes import Gravity, Notes
from benchmark.gpu_report.platform import Platform


def device_launch(platform: Platform, notes: Notes) -> None:
    """Every stage of the bundled models: those of one device, and those that exchange rows with
    another."""
    total = refused = 0
    for name in platform.scale.models:
        for crosses in (False, True):
            counts = _of_model(platform, notes, name, crosses)
            total, refused = total + counts[0], refused + counts[1]
    notes.headline("stages whose graph the device can launch", total - refused, f"of {total}")


def _of_model(platform: Platform, notes: Notes, name: str, crosses: bool) -> tuple[int, int]:
    """Returns how many stages there are, and how many are refused."""
    notes.at("loads the model", model=name)
    model, buckets, device = load(platform, name), platform.scale.buckets, platform.device
    spec, crossing = model.spec, Crossing()
    lanes: list[LaneBuffers]
    stages: dict[tuple[int, int, int], HasStages] = {}
    if crosses:
        row_bytes = spec.hidden * DTYPE_BYTES[spec.dtype]
        layout = LinkLayout(buckets[-1], row_bytes)
        memory = torch.zeros(layout.link_bytes, dtype=torch.uint8, device=device)
        link = LinkMemory(memory.data_ptr(), layout.payload_bytes, layout.max_rows, row_bytes)
        crossing = Crossing(links=(0,), own=None)
        lanes, own = make_stages(
            [model], buckets, 1, buckets[-1], device, links=[[link]], crossings=[crossing]
        )
        assert model.ffn is not None
        counts = ServedCounts(1, device)
        serving, served = make_serving(
            [spec], {0: model.ffn}, buckets, [link], device, counts=counts, first_lane=1
        )
        lanes, stages = [*lanes, *serving], {**own, **served}
    else:
        lanes, own = make_stages([model], buckets, 1, buckets[-1], device)
        stages = {**own}
    notes.at("captures every stage", model=name)
    graphs = platform.capture(lanes, stages)
    known = model_stages(spec, crossing)
    loop = platform.loop([known], lanes, buckets)
    refused = 0
    for (lane, _, stage, bucket), graph in graphs.items():
        words = stage.name + (" of a served dispatch" if lane else "")
        where = {"model": name, "stage": words, "bucket": buckets[bucket]}
        notes.at("instantiates for launches from the device", **where)
        nodes = dict(Counter(platform.node_types(graph)))
        try:
            loop.add_graph(lane, 0, stage, bucket, graph.raw_cuda_graph())
        except CudaLoopError as error:
            refused += 1
            notes.finding(Gravity.REFUSED, f"{error}; its nodes: {nodes}", **where)
        else:
            notes.fact("instantiated", nodes, **where)
    loop.close()
    return len(graphs), refused
