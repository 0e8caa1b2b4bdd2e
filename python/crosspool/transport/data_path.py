"""The data path: hidden states between attention ranks and FFN ranks, layer by layer.

A link joins one lane of one attention rank to one FFN rank. The attention rank dispatches rows; the
FFN rank finds the dispatch by polling, runs its part of the layer, and replies with its partial
sum; the attention rank combines. At most one dispatch is outstanding on a link, and an FFN rank
never waits for an attention rank, so nothing can wait in a circle.

Both ends see the same interface whatever lies between them: :class:`LocalLink` where both ranks
live on one device, shared memory (:mod:`crosspool.transport.shared_memory`) between devices of one
host, and a connection (:mod:`crosspool.transport.network_links`) between hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from crosspool.config.deployment import Deployment
    from crosspool.config.device import Device


SPIN_NS = 20_000
"""How long a device with cores of its own spins before it sleeps, in ns: about what a wake-up
costs."""


class LaneError(RuntimeError):
    """An end of a link broke the lane protocol, or the ends disagree about a payload."""


class DispatchHeader(NamedTuple):
    """What a dispatch asks for. All fields are unsigned; ``epoch`` has 64 bits, the others 32."""

    epoch: int
    """Incarnation of the attention rank; :meth:`AttentionLink.combine` refuses the reply to another
    incarnation's dispatch."""
    model: int
    """The model's number."""
    layer: int
    rows: int


@dataclass(slots=True)
class LinkCounters:
    """What has crossed one link, as one end counts it: payloads without headers."""

    dispatches: int = 0
    rows: int = 0
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    """Hidden size times dtype bytes for each row and layer, as in ``dispatch_bytes``."""


class AttentionLink(Protocol):
    """The attention rank's end of one lane to one FFN rank."""

    attention_rank: int
    lane: int
    ffn_rank: int
    counters: LinkCounters

    @property
    def free(self) -> bool:
        """Whether no dispatch of this rank, or of its predecessor, waits for a reply or to be
        combined."""
        ...

    def dispatch(self, header: DispatchHeader, hidden: Tensor) -> None:
        """Publishes ``hidden`` [header.rows, hidden size], which stays as it is until combined.

        Raises LaneError when the last dispatch was not combined, or on a wrong shape or size."""
        ...

    def ready(self) -> bool:
        """Whether a dispatch is outstanding and the FFN rank has replied to it."""
        ...

    def combine(self, out_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The FFN rank's partial sum [rows, hidden size], to be read before the next dispatch.

        Raises LaneError when it is not :meth:`ready`, of another epoch, or not of this size."""
        ...

    def take_refusal(self) -> bool:
        """Whether the FFN rank has refused the dispatch, which is over then. The link must be
        :meth:`ready`."""
        ...


class FFNLink(Protocol):
    """The FFN rank's end of one lane of one attention rank."""

    attention_rank: int
    lane: int
    ffn_rank: int
    counters: LinkCounters

    def poll(self) -> DispatchHeader | None:
        """The dispatch that waits for a reply, the same until :meth:`reply`; None without one."""
        ...

    def hidden(self, dtype: torch.dtype) -> Tensor:
        """The polled dispatch's rows [rows, hidden size], to be read before :meth:`reply`.

        Raises LaneError when nothing was polled or the payload is no whole rows of ``dtype``."""
        ...

    def reply(self, partial: Tensor) -> None:
        """Replies to the polled dispatch with a partial sum of the payload's shape and dtype, which
        stays as it is until the next dispatch.

        Raises LaneError when nothing was polled, or on a wrong shape or size."""
        ...

    def refuse(self) -> None:
        """Replies to the polled dispatch that its model is not here and does not come. Raises
        LaneError when nothing was polled."""
        ...


def remote_pairs(deployment: Deployment) -> list[tuple[int, int]]:
    """(attention rank, FFN rank) of every pair whose ranks live on different devices, ascending."""
    return [
        (attention_rank, ffn_rank)
        for attention_rank, attention in enumerate(deployment.kv_pool_devices)
        for ffn_rank, ffn in enumerate(deployment.weight_pool_devices)
        if attention != ffn
    ]


def between_hosts(deployment: Deployment) -> list[tuple[int, int]]:
    """Those of :func:`remote_pairs` whose devices are on different hosts."""
    kv_pool, weight_pool = deployment.kv_pool_devices, deployment.weight_pool_devices
    return [
        (attention_rank, ffn_rank)
        for attention_rank, ffn_rank in remote_pairs(deployment)
        if kv_pool[attention_rank].node != weight_pool[ffn_rank].node
    ]


def within_hosts(deployment: Deployment) -> list[tuple[int, int]]:
    """Those of :func:`remote_pairs` whose devices are on the same host."""
    apart = set(between_hosts(deployment))
    return [pair for pair in remote_pairs(deployment) if pair not in apart]


def spin_ns_of(deployment: Deployment, device: Device) -> int:
    """Longest spin of a waiting device: SPIN_NS if no other device has one of its cores, else 0."""
    others = (d for d in deployment.own_devices if d.is_cpu and d != device)
    shared = any(not set(device.cores).isdisjoint(other.cores) for other in others)
    return 0 if shared else SPIN_NS


class LocalLink:
    """Both ends of a link within one device process: tensors pass by reference, nothing is copied.

    The counters count what would have crossed, so they equal those of ranks on two devices; both
    ends share them."""

    def __init__(self, attention_rank: int, lane: int, ffn_rank: int) -> None:
        self.attention_rank = attention_rank
        self.lane = lane
        self.ffn_rank = ffn_rank
        self.counters = LinkCounters()
        self._header: DispatchHeader | None = None
        self._hidden: Tensor | None = None
        self._partial: Tensor | None = None
        self._refused = False

    @property
    def free(self) -> bool:
        return self._hidden is None

    def dispatch(self, header: DispatchHeader, hidden: Tensor) -> None:
        if self._hidden is not None:
            raise LaneError(f"lane {self.lane}: a dispatch is outstanding")
        check_rows(header, hidden)
        self._header, self._hidden = header, hidden
        self.counters.dispatches += 1
        self.counters.rows += header.rows
        self.counters.dispatch_bytes += hidden.nbytes

    def ready(self) -> bool:
        return self._partial is not None or self._refused

    def combine(self, out_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        partial = self._partial
        if partial is None:
            raise LaneError(f"lane {self.lane}: nothing to combine")
        if partial.shape != tuple(out_shape) or partial.dtype != dtype:
            raise LaneError(
                f"lane {self.lane}: the partial sum is {tuple(partial.shape)} of {partial.dtype},"
                f" not {tuple(out_shape)} of {dtype}"
            )
        self._header = self._hidden = self._partial = None
        self.counters.combine_bytes += partial.nbytes
        return partial

    def poll(self) -> DispatchHeader | None:
        return self._header

    def hidden(self, dtype: torch.dtype) -> Tensor:
        hidden = self._hidden
        if self._header is None or hidden is None:
            raise LaneError(f"lane {self.lane}: no dispatch was polled")
        if hidden.dtype != dtype:
            raise LaneError(f"lane {self.lane}: the dispatch is {hidden.dtype}, not {dtype}")
        return hidden

    def reply(self, partial: Tensor) -> None:
        if self._header is None or self._hidden is None:
            raise LaneError(f"lane {self.lane}: no dispatch to reply to")
        if partial.shape != self._hidden.shape or partial.dtype != self._hidden.dtype:
            raise LaneError(
                f"lane {self.lane}: a partial sum {tuple(partial.shape)} of {partial.dtype} does"
                f" not fit {tuple(self._hidden.shape)} of {self._hidden.dtype}"
            )
        self._header, self._partial = None, partial

    def take_refusal(self) -> bool:
        refused, self._refused = self._refused, False
        if refused:
            self._hidden = None
        return refused

    def refuse(self) -> None:
        if self._header is None:
            raise LaneError(f"lane {self.lane}: no dispatch to refuse")
        self._header, self._refused = None, True


def check_rows(header: DispatchHeader, hidden: Tensor) -> None:
    """Raises LaneError unless ``hidden`` is [header.rows, hidden size] with at least one row."""
    if hidden.dim() != 2 or hidden.shape[0] != header.rows or header.rows < 1:
        raise LaneError(f"a dispatch of {header.rows} rows came with {tuple(hidden.shape)}")
