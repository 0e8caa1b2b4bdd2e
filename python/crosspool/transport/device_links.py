"""Links in the memory of GPUs.

The links of an FFN rank lie one after another, ordered by attention rank on another device and then
by lane, each as in lanes.h. Where GPUs reach each other's memory with loads and stores
(:mod:`crosspool.transport.peer_memory`), there is one copy, in memory of the FFN rank's GPU, which
then polls its own memory. Elsewhere (:mod:`crosspool.transport.nvshmem`) each end has a copy of
all.

Resident loops use all of a link (:meth:`DeviceLinks.attention_place`). A host loop cannot look into
a GPU's memory cheaply; it keeps signals, headers and doorbells in the host's segment
(:mod:`crosspool.transport.shared_memory`) and uses the payloads alone
(:meth:`DeviceLinks.payloads`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.transport.data_path import remote_pairs
from crosspool.transport.lane_layout import LINK_HEAD_BYTES, LinkLayout, LinkPlace

if TYPE_CHECKING:
    from torch import Tensor

    from crosspool.kernels.dlpack import DLPackDevice


Tail = Callable[[int], None]
"""Ends a captured stage; takes the stream under capture."""


@dataclass(frozen=True)
class DeviceLinks:
    """The links of one device to other devices, in memory that both reach."""

    deployment: Deployment
    device: Device
    layout: LinkLayout
    bases: Mapping[int, int]
    """Address, on this device, of the links of each FFN rank with which it shares a link."""
    memory: DLPackDevice

    def payloads(self, attention_rank: int, lane: int, ffn_rank: int) -> Tensor:
        """Returns the bytes of a link's dispatch payload, with its combine payload behind them.

        Raises ValueError when this device has no such link."""
        import torch

        from crosspool.kernels.dlpack import tensor_at

        address = self._address(attention_rank, lane, ffn_rank) + LINK_HEAD_BYTES
        size = 2 * self.layout.payload_bytes
        return tensor_at(address, (size,), torch.uint8, self.memory, owner=self)

    def settle(self) -> None:
        """Waits until the work that this thread queued on its GPU is done, so that a peer may be
        told."""
        from crosspool.kernels.dlpack import DLPACK_CUDA

        if self.memory.kind == DLPACK_CUDA:
            import torch

            torch.cuda.current_stream(self.memory.ordinal).synchronize()

    def attention_place(self, lane: int, ffn_rank: int) -> LinkPlace:
        """Returns the end of this device's attention rank for device code, which polls and so has
        no doorbell.

        Raises ValueError when there is no such link."""
        return self._place(self.deployment.kv_pool_devices.index(self.device), lane, ffn_rank)

    def ffn_place(self, attention_rank: int, lane: int) -> LinkPlace:
        """Returns the end of this device's FFN rank, as :meth:`attention_place` does."""
        ffn_rank = self.deployment.weight_pool_devices.index(self.device)
        return self._place(attention_rank, lane, ffn_rank)

    def dispatch_tail(
        self,
        lane: int,
        ffn_ranks: Sequence[int],
        *,
        words: int,
        epoch: int,
        model: int,
        row_bytes: int,
    ) -> Tail | None:
        """Returns what must end a captured dispatch of a lane so that ``ffn_ranks`` get it; None
        where they see what the stage has written.

        ``words``: address of the lane's ``StageWords``; ``epoch``: the loop's."""
        return None

    def reply_tail(self, links: Sequence[tuple[int, int]], *, words: int) -> Tail | None:
        """Returns what must end a captured FFN stage of a lane that serves ``links``, (attention
        rank, lane) each; None as for :meth:`dispatch_tail`."""
        return None

    def _place(self, attention_rank: int, lane: int, ffn_rank: int) -> LinkPlace:
        return LinkPlace(
            address=self._address(attention_rank, lane, ffn_rank),
            payload_bytes=self.layout.payload_bytes,
            max_rows=self.layout.max_rows,
            max_row_bytes=self.layout.max_row_bytes,
            peer_doorbell=0,
        )

    def _address(self, attention_rank: int, lane: int, ffn_rank: int) -> int:
        ranks = attention_ranks_of(self.deployment, ffn_rank)
        known = ffn_rank in self.bases and attention_rank in ranks
        if not known or not 0 <= lane < self.deployment.lanes:
            raise ValueError(
                f"{self.device.name} has no link of attention rank {attention_rank}, lane {lane},"
                f" FFN rank {ffn_rank}"
            )
        index = ranks.index(attention_rank) * self.deployment.lanes + lane
        return self.bases[ffn_rank] + index * self.layout.link_bytes


def attention_ranks_of(deployment: Deployment, ffn_rank: int) -> list[int]:
    """Returns the attention ranks on other devices than the FFN rank, ascending."""
    return [attention for attention, ffn in remote_pairs(deployment) if ffn == ffn_rank]


def links_bytes(deployment: Deployment, layout: LinkLayout, ffn_rank: int) -> int:
    """Returns the bytes of all links of an FFN rank."""
    return len(attention_ranks_of(deployment, ffn_rank)) * deployment.lanes * layout.link_bytes


def linked_ffn_ranks(deployment: Deployment, device: Device) -> list[int]:
    """Returns the FFN ranks with which the device shares a link, its own included, ascending."""
    return sorted(
        {
            ffn
            for attention, ffn in remote_pairs(deployment)
            if device
            in (deployment.kv_pool_devices[attention], deployment.weight_pool_devices[ffn])
        }
    )
