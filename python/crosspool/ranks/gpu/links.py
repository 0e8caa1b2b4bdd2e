"""The links of a GPU's lanes as its stages, its loop and its counters take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from crosspool.kernels.cuda_loop import MAX_LINKS, GPUStage, LinkMemory, ModelStages
from crosspool.ranks.gpu.exchange import DispatchEnd, HostExchange, ReplyEnd
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.lane_layout import LINK_HEAD_BYTES, LinkPlace

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment
    from crosspool.config.device import Device
    from crosspool.ranks.gpu.host_side import HostSide
    from crosspool.ranks.gpu.scratch import LaneBuffers
    from crosspool.transport.device_links import Tail
    from crosspool.transport.links import GPUPeers

T = TypeVar("T")


@dataclass(frozen=True)
class Crossing:
    """Links through which a model's rows leave the device of an attention rank."""

    links: tuple[int, ...] = ()
    """Indices of the lane's links that lead to FFN ranks of the model, ordered by rank."""
    own: int | None = 0
    """Place of this device's FFN rank among the model's FFN ranks; None: it is none of them."""


def remote_ffn_ranks(deployment: Deployment, device: Device) -> list[int]:
    """FFN ranks on other devices, ascending. The links of a lane lead to them, in this order."""
    return [rank for rank, other in enumerate(deployment.weight_pool_devices) if other != device]


def crossing_of(deployment: Deployment, device: Device, model: int) -> Crossing:
    """Returns how a model's rows leave ``device``."""
    ranks = deployment.ffn_ranks(model)
    remote = remote_ffn_ranks(deployment, device)
    own = [i for i, rank in enumerate(ranks) if rank not in remote]
    return Crossing(
        links=tuple(remote.index(rank) for rank in ranks if rank in remote),
        own=own[0] if own else None,
    )


@dataclass(frozen=True)
class LanePayloads:
    """Addresses of the payloads of links, int64 [links] on the device."""

    dispatched: Tensor
    combined: Tensor

    @classmethod
    def of(
        cls, links: Sequence[LinkMemory], device: torch.device, partial: tuple[int, Tensor] | None
    ) -> LanePayloads:
        """``partial``: this device's own partial sum, and its place among the others."""
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
    counters: LinkCounters = field(default_factory=LinkCounters)


class ServedCounts:
    """Counts of what came through the links of other devices' lanes. FFN stages keep them on the
    device."""

    def __init__(self, links: int, host: HostSide) -> None:
        self.memory = torch.zeros(links, 3, dtype=torch.int64, device=host.device)
        """Dispatches, rows and bytes of each link."""
        self._host = host
        self._read = host.full((3,), 0, torch.int64)

    def read(self, link: int) -> LinkCounters:
        with self._host.beside():
            self._read.copy_(self.memory[link])
        dispatches, rows, size = self._read.tolist()
        return LinkCounters(dispatches, rows, size, size)


@dataclass
class ServedLink:
    """A link of another device's lane to this GPU's FFN rank."""

    attention_rank: int
    lane: int
    ffn_rank: int
    _counts: ServedCounts
    _link: int

    @property
    def counters(self) -> LinkCounters:
        return self._counts.read(self._link)


class GPULinks:
    """Opens a GPU's links to other devices for :func:`crosspool.transport.links.open_ends`, and
    keeps what stages, graphs and loop need of them.

    The links to the FFN rank are served by lanes of its own, eight by each, in the order in which
    they were opened."""

    def __init__(
        self, deployment: Deployment, device: Device, peers: GPUPeers | None, host: HostSide
    ) -> None:
        """``peers``: None where nothing is opened."""
        self._peers = peers
        kv_pool, weight_pool = deployment.kv_pool_devices, deployment.weight_pool_devices
        self.attention_rank = kv_pool.index(device) if device in kv_pool else None
        self.ffn_rank = weight_pool.index(device) if device in weight_pool else None
        self._remote = remote_ffn_ranks(deployment, device)
        others = sum(peer != device for peer in kv_pool) if self.ffn_rank is not None else 0
        self.counts = ServedCounts(others * deployment.lanes, host)
        self.outgoing: list[list[LinkMemory]] = [[] for _ in range(deployment.lanes)]
        """Links of each lane of the attention rank, by FFN rank."""
        self.incoming: list[LinkMemory] = []
        """Links of other devices to the FFN rank."""
        self.sources: list[tuple[int, int]] = []
        """Attention rank and lane at the other end of each incoming link."""
        self._dispatches: list[list[DispatchEnd]] = [[] for _ in range(deployment.lanes)]
        self._replies: list[ReplyEnd] = []

    def attention_link(self, lane: int, ffn_rank: int) -> CountedLink:
        """Opens the attention rank's end of a link."""
        assert self._peers is not None and self.attention_rank is not None
        place = self._peers.links.attention_place(lane, ffn_rank)
        self.outgoing[lane].append(_memory_of(place))
        if self._peers.host is not None:
            self._dispatches[lane].append(self._peers.host.attention_link(lane, ffn_rank))
        return CountedLink(self.attention_rank, lane, ffn_rank)

    def ffn_link(self, attention_rank: int, lane: int) -> ServedLink:
        """Opens the FFN rank's end of a link."""
        assert self._peers is not None and self.ffn_rank is not None
        self.incoming.append(_memory_of(self._peers.links.ffn_place(attention_rank, lane)))
        self.sources.append((attention_rank, lane))
        if self._peers.host is not None:
            self._replies.append(self._peers.host.ffn_link(attention_rank, lane))
        return ServedLink(attention_rank, lane, self.ffn_rank, self.counts, len(self.incoming) - 1)

    def host_exchange(self, held: frozenset[int], buckets: Sequence[int]) -> HostExchange | None:
        """Returns what the host loop does with other devices; None: nothing, or the loop is
        resident. ``held``: models of which the FFN rank holds a part."""
        if self._peers is None or self._peers.host is None:
            return None
        served = by_lane(self._replies)
        return HostExchange(self._peers.host, self._dispatches, served, held, buckets)

    def tails(
        self,
        lanes: Sequence[LaneBuffers],
        models: Sequence[ModelStages],
        held: frozenset[int],
        epoch: int,
    ) -> Mapping[tuple[int, int, GPUStage], Tail]:
        """Returns what must end captured stages, by lane, model and stage, where peers do not see
        what the stages have written. ``held``: as for :meth:`host_exchange`; ``epoch``: the
        loop's."""
        if self._peers is None:
            return {}
        links, served = self._peers.links, iter(by_lane(self.sources))
        found: dict[tuple[int, int, GPUStage], Tail | None] = {}
        for number, lane in enumerate(lanes):
            words = lane.words.data_ptr()
            if lane.serves:
                reply = links.reply_tail(next(served), words=words)
                for model in held:
                    for stage in (GPUStage.DENSE_FFN, GPUStage.MOE_FFN):
                        found[number, model, stage] = reply
                continue
            for model, stages in enumerate(models):
                if stages.links:
                    found[number, model, GPUStage.DISPATCH] = links.dispatch_tail(
                        number,
                        [self._remote[link] for link in stages.links],
                        words=words,
                        epoch=epoch,
                        model=model,
                        row_bytes=stages.row_bytes,
                    )
        return {place: tail for place, tail in found.items() if tail is not None}


def by_lane(links: Sequence[T]) -> list[Sequence[T]]:
    """Cuts an FFN rank's links into those of each of its lanes."""
    return [links[first : first + MAX_LINKS] for first in range(0, len(links), MAX_LINKS)]


def _memory_of(place: LinkPlace) -> LinkMemory:
    """A link as the resident loop takes it."""
    return LinkMemory(place.address, place.payload_bytes, place.max_rows, place.max_row_bytes)
