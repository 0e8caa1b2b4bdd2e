"""Which links two devices share, and who opens them: the one place that knows all interconnects.

Ranks on the same device share no memory beside their process's. Devices on CPUs share a segment
(:mod:`crosspool.transport.shared_memory`), which the launcher makes and every device process
inherits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol, TypeVar

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.transport.shared_memory import SharedMemoryTransport

A_co = TypeVar("A_co", covariant=True)
F_co = TypeVar("F_co", covariant=True)
L = TypeVar("L")


class OpensLinks(Protocol[A_co, F_co]):
    """Opens one device's ends of its links to other devices, in the form that a loop takes."""

    def attention_link(self, lane: int, ffn_rank: int) -> A_co:
        """The end of this device's attention rank."""

    def ffn_link(self, attention_rank: int, lane: int) -> F_co:
        """The end of this device's FFN rank."""


def open_ends(
    deployment: Deployment,
    device: Device,
    *,
    local: Callable[[int, int, int], L],
    remote: OpensLinks[A_co, F_co] | None,
) -> tuple[list[list[A_co | L]], list[F_co | L]]:
    """Opens the device's end of every link of its ranks.

    Returns the ends of the attention rank, indexed [lane][FFN rank], and those of the FFN rank,
    lane by lane and within a lane by attention rank; without the rank, none. A link within the
    device is in both: ``local`` makes it, from (attention rank, lane, FFN rank). ``remote`` opens
    the others; None: the device has no peers."""
    lanes = range(deployment.lanes)
    kv_pool, weight_pool = deployment.kv_pool_devices, deployment.weight_pool_devices
    own: dict[int, L] = {}
    if device in kv_pool and device in weight_pool:
        pair = kv_pool.index(device), weight_pool.index(device)
        own = {lane: local(pair[0], lane, pair[1]) for lane in lanes}
    outgoing: list[list[A_co | L]] = []
    served: list[F_co | L] = []
    if device in kv_pool:
        outgoing = [
            [
                own[lane] if peer == device else _joined(remote).attention_link(lane, rank)
                for rank, peer in enumerate(weight_pool)
            ]
            for lane in lanes
        ]
    if device in weight_pool:
        served = [
            own[lane] if peer == device else _joined(remote).ffn_link(rank, lane)
            for lane in lanes
            for rank, peer in enumerate(kv_pool)
        ]
    return outgoing, served


def _joined(remote: OpensLinks[A_co, F_co] | None) -> OpensLinks[A_co, F_co]:
    if remote is None:
        raise RuntimeError("a device has peers on other devices: pass --lanes-fd")
    return remote


def join(
    deployment: Deployment, device: Device, lanes_fd: int | None
) -> SharedMemoryTransport | None:
    """Returns the device's ends of the links to other devices; None where it has none.

    ``lanes_fd``: what :func:`create` made; it is closed."""
    if lanes_fd is None:
        return None
    try:
        return SharedMemoryTransport(lanes_fd, deployment, device)
    finally:
        os.close(lanes_fd)
