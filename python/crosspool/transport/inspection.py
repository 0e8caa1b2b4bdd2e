"""What a deployment tells about itself, in typed structs: the devices' replies to ``Inspect``, and
the scheduler's status.

The front end sends them to HTTP clients as JSON objects with the same field names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from crosspool.observability.trace import LaneEvent

InspectWhat = Literal["tensors", "pools", "counters", "trace_start", "trace_stop"]
"""What a device process can be asked; :class:`Report` says which of its fields the reply sets."""


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor, or the share of one, that a rank holds."""

    device: str
    role: Literal["attention", "ffn"]
    rank: int
    model: str
    layer: int | None
    """None for embeddings, final norm and LM head."""
    key: str
    """CrossPool's name for the tensor within its layer."""
    name: str
    """The checkpoint's name for it."""
    shape: tuple[int, ...]
    """Shape of the share that the rank holds."""
    dtype: str
    bytes: int


class DevicePools(msgspec.Struct, frozen=True, kw_only=True):
    """KV memory of one device's attention rank; empty and 0 where the device has none."""

    device: str
    mapped_bytes: dict[str, int] = {}
    """Bytes mapped for each model, by its name."""
    free_bytes: int = 0
    """Bytes of the budget that are mapped for no model."""
    budget_bytes: int = 0
    rss_bytes: int
    """Resident memory of the device process."""


class LinkCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What has crossed one lane between an attention rank and an FFN rank, without headers."""

    attention_rank: int
    lane: int
    ffn_rank: int
    dispatches: int
    rows: int
    dispatch_bytes: int
    combine_bytes: int


class DeviceCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What one device's ranks have done since they were loaded."""

    device: str
    steps: int = 0
    """Steps that its attention rank has begun."""
    requests: int = 0
    """Requests that live on its attention rank now."""
    links: list[LinkCounts] = []
    """The links of its attention rank, as that end counts."""
    served: list[LinkCounts] = []
    """The links of its FFN rank, as that end counts."""


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The reply of one device process to ``Inspect``, or of all of them together.

    Only the field that was asked for is set; the reply to ``trace_start`` has none."""

    tensors: list[TensorInfo] = []
    pools: list[DevicePools] = []
    """One entry for each device."""
    counters: list[DeviceCounters] = []
    """One entry for each device."""
    events: list[LaneEvent] = []
    """The reply to ``trace_stop``: what the device recorded, oldest first."""

    @classmethod
    def joined(cls, reports: Iterable[Report]) -> Report:
        """What several devices replied to one question; lane events in order of their start."""
        reports = list(reports)
        return cls(
            tensors=[tensor for report in reports for tensor in report.tensors],
            pools=[pools for report in reports for pools in report.pools],
            counters=[counters for report in reports for counters in report.counters],
            events=sorted(
                (event for report in reports for event in report.events),
                key=lambda event: event.start_ns,
            ),
        )
