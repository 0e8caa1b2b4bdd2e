"""Loads the ranks of one device for the host loop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.models.spec import ModelSpec
from crosspool.observability.trace import LaneTrace
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.host.attention_rank import AttentionRank
from crosspool.ranks.host.executor import HostLoop
from crosspool.ranks.host.ffn_rank import FFNRank
from crosspool.ranks.host.residency import HostModels, HostWeights
from crosspool.ranks.kv_memory import kv_pool
from crosspool.ranks.weights import held_models
from crosspool.transport.connector import Peers
from crosspool.transport.data_path import LocalLink
from crosspool.transport.links import join, open_ends
from crosspool.weightpool.placement import Placement, initially_resident


def load_host_ranks(
    deployment: Deployment,
    device: Device,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
    *,
    peers: Peers | None = None,
) -> DeviceRanks:
    """Loads the ranks of a device for the host loop; see
    :func:`crosspool.ranks.device_process.load_ranks`."""
    trace, specs = LaneTrace(), dict(specs)
    weights = HostWeights({}, {})
    held = {one.index: one for one in held_models(deployment, device, specs, placement)}
    for index in sorted(initially_resident(deployment, specs) & held.keys()):
        with held[index].loading(device) as loaded:
            weights.load(held[index], loaded.progress)
    resources = contextlib.ExitStack()
    attention = ffn = None
    if device in deployment.kv_pool_devices:
        virtualizer, kv = kv_pool(deployment, device, specs)
        resources.callback(virtualizer.close)
        rank = deployment.kv_pool_devices.index(device)
        attention = AttentionRank(rank, specs, weights.attention, virtualizer, kv)
    transport = join(deployment, device, lanes_fd, peers, resources=resources)
    ends = open_ends(deployment, device, local=LocalLink, remote=transport)
    links, served = ends
    if device in deployment.weight_pool_devices:
        rank = deployment.weight_pool_devices.index(device)
        ffn = FFNRank(rank, specs, weights.ffn, {m for m, h in held.items() if h.ffn}, trace)
        ffn.links = served
    ffn_ranks = {model: deployment.ffn_ranks(model) for model in deployment.models}
    executor = HostLoop(
        attention,
        links,
        ffn,
        ffn_ranks=ffn_ranks,
        doorbell=transport,
        serves_peers=ffn is not None and any(d != device for d in deployment.kv_pool_devices),
        trace=trace,
    )
    for index in held.keys() - initially_resident(deployment, specs):
        executor.hold(index)
    return DeviceRanks(
        *(deployment, device, executor, attention, ffn, links, trace, resources),
        HostModels(
            *(deployment, device, held, weights, executor),
            attention=attention,
            ffn=ffn,
            specs=specs,
            ffn_ranks=ffn_ranks,
            row_room=None if transport is None else transport.max_row_bytes,
        ),
    )
