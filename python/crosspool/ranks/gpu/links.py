"""The links of a GPU's lanes as its stages, its loop and its counters take them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosspool.kernels.cuda_loop import LinkMemory
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.lane_layout import LINK_HEAD_BYTES, LinkPlace

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment
    from crosspool.config.device import Device


@dataclass(frozen=True)
class Crossing:
    """How a model's rows leave an attention rank's device."""

    links: tuple[int, ...] = ()
    """The lane's links that lead to FFN ranks of the model, by rank."""
    own: int | None = 0
    """Place of this device's FFN rank among the model's; None: it holds nothing of the model."""


def remote_ffn_ranks(deployment: Deployment, device: Device) -> list[int]:
    """FFN ranks on other devices, ascending: to these the links of a lane lead, in this order."""
    return [rank for rank, other in enumerate(deployment.weight_pool_devices) if other != device]


def crossing_of(deployment: Deployment, device: Device, model: int) -> Crossing:
    """Of a model on the attention rank of ``device``."""
    ranks = deployment.ffn_ranks(model)
    remote = remote_ffn_ranks(deployment, device)
    own = [i for i, rank in enumerate(ranks) if rank not in remote]
    return Crossing(
        links=tuple(remote.index(rank) for rank in ranks if rank in remote),
        own=own[0] if own else None,
    )


def memory_of(place: LinkPlace) -> LinkMemory:
    """A link as the resident loop takes it."""
    return LinkMemory(place.address, place.payload_bytes, place.max_rows, place.max_row_bytes)


@dataclass(frozen=True)
class LanePayloads:
    """Where the payloads of links lie: addresses, int64 [links], on the device."""

    dispatched: Tensor
    combined: Tensor

    @classmethod
    def of(
        cls, links: Sequence[LinkMemory], device: torch.device, partial: tuple[int, Tensor] | None
    ) -> LanePayloads:
        """``partial``: a partial sum of this device's own, and its place among the others."""
        dispatched = [int(link.link) + LINK_HEAD_BYTES for link in links]
        combined = [
            address + int(link.payload_bytes)
            for address, link in zip(dispatched, links, strict=True)
        ]
        if partial is not None:
            combined.insert(partial[0], partial[1].data_ptr())
        return cls(
            torch.tensor(dispatched, dtype=torch.int64).to(device),
            torch.tensor(combined, dtype=torch.int64).to(device),
        )


@dataclass
class CountedLink:
    """A link of the attention rank, as far as its counters go; the executor keeps them."""

    attention_rank: int
    lane: int
    ffn_rank: int
    counters: LinkCounters


class ServedCounts:
    """What came through the links of other devices' lanes, counted on the device by the FFN
    stages."""

    def __init__(self, links: int, device: torch.device) -> None:
        self.memory = torch.zeros(links, 3, dtype=torch.int64, device=device)
        """By link: dispatches, rows, bytes."""
        # torch's default stream would wait for a loop that never ends.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, link: int) -> LinkCounters:
        beside = (
            contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        with beside:
            dispatches, rows, size = self.memory[link].tolist()
        return LinkCounters(dispatches, rows, size, size)


class ServedLink:
    """A link of another device's lane to this GPU's FFN rank."""

    def __init__(
        self, attention_rank: int, lane: int, ffn_rank: int, counts: ServedCounts, link: int
    ) -> None:
        self.attention_rank = attention_rank
        self.lane = lane
        self.ffn_rank = ffn_rank
        self._counts = counts
        self._link = link

    @property
    def counters(self) -> LinkCounters:
        return self._counts.read(self._link)
