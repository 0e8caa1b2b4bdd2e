"""What a deployment tells about itself, in typed structs: the devices' replies to ``Inspect``, and
the scheduler's status.

The front end sends them to HTTP clients as JSON objects with the same field names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from crosspool.config.options import Keep
from crosspool.observability.trace import LaneEvent

InspectWhat = Literal["tensors", "pools", "counters", "trace_start", "trace_stop"]
"""What a device process can be asked; the reply is the field of :class:`Report` with this name."""


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


class ExpertCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What has happened on one FFN rank to the routed experts of a model that has them in memory on
    demand, since the model was woken."""

    model: str
    hits: int
    """Experts that a layer of a step needed and found in memory."""
    misses: int
    """Experts that a layer of a step needed and waited for."""
    early: int
    """Experts that were read before a layer needed them, ..."""
    early_used: int
    """... and that were still there when one did."""
    read_bytes: int
    evictions: int
    """Times that an expert went to make room, for one of any model."""
    stall_seconds: float
    """Seconds for which layers waited for experts, added up."""
    present_bytes: int
    """Bytes of the experts that are in memory now."""


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
    experts: list[ExpertCounts] = []
    """One entry for each model whose experts its FFN rank has in memory on demand."""


class DeviceEvents(msgspec.Struct, frozen=True, kw_only=True):
    """The lane events that one device recorded, oldest first."""

    device: str
    events: list[LaneEvent]


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The reply of one device process to ``Inspect``, or of all of them together.

    The field with the name of the question is set, and ``missing``; the others are empty."""

    tensors: list[TensorInfo] = []
    pools: list[DevicePools] = []
    """One entry for each device."""
    counters: list[DeviceCounters] = []
    """One entry for each device."""
    trace_start: list[str] = []
    """Names of the devices that record lane events from now on."""
    trace_stop: list[DeviceEvents] = []
    """One entry for each device."""
    missing: list[str] = []
    """Names of the devices that are away, for which nothing is told."""

    @classmethod
    def joined(cls, reports: Iterable[Report]) -> Report:
        """What several devices replied to one question."""
        reports = list(reports)
        fields = cls.__struct_fields__
        return cls(**{f: [e for report in reports for e in getattr(report, f)] for f in fields})

    def plain(self, what: InspectWhat, models: Mapping[int, str]) -> list[Any]:
        """The field ``what`` as HTTP clients see it, for the JSON encoder. Lane events become one
        list, in order of their start, with the names of ``models`` for their numbers; a model that
        has gone since has none."""
        if what != "trace_stop":
            return list(msgspec.to_builtins(getattr(self, what)))
        events = [(of.device, event) for of in self.trace_stop for event in of.events]
        return [
            {"device": device, **msgspec.structs.asdict(event), "model": models.get(event.model)}
            for device, event in sorted(events, key=lambda entry: entry[1].start_ns)
        ]


ModelState = Literal["asleep", "waking", "resident", "falling_asleep", "leaving"]
"""Where a model's weights are. ``asleep``: on disk alone; ``waking``: on their way into the pools;
``resident``: in the pools of every device that has a share of them; ``falling_asleep``: given up,
but not everywhere yet; ``leaving``: the model takes no requests any more and will be gone."""


class ModelResidency(msgspec.Struct, frozen=True, kw_only=True):
    """Where one model's weights are, and what decides that."""

    state: ModelState
    keep: Keep
    ttl: float | None
    """Seconds without a request after which the model sleeps; None for never."""
    priority: int
    attention_bytes: int
    """Bytes of its attention part on all devices of the KV pool together, while it is resident."""
    ffn_bytes: int
    """Bytes of its FFN weights on all devices of the weight pool together, while it is resident."""
    read_bytes: int = 0
    """Bytes that all devices together have read of the wake that is under way."""
    total_bytes: int = 0
    """Bytes that they have to read for it; 0 until they have told."""
    wakes: int = 0
    """Times that it has become resident since the server's start."""
    failed_wakes: int = 0
    sleeps: int = 0
    waking_seconds: float = 0.0
    """Seconds of all wakes together, failed ones included."""
    last_wake_seconds: float | None = None
    """Seconds that the last wake took; None before the first."""
    last_error: str | None = None
    """Why the last wake failed; None if it did not."""
    idle_seconds: float | None = None
    """Seconds since it last had a request; 0 while it has any, None if it never had."""


class RankInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one rank, for the pools' table and for the readiness check."""

    role: Literal["attention", "ffn"]
    rank: int
    weight_bytes: int
    kv_bytes: int
    """KV budget of an attention rank; 0 for an FFN rank."""


class KVShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one model has of one attention rank now."""

    model: int
    """The model's number."""
    running: int
    """Requests admitted and not finished."""
    paused: int
    """Those of the running requests that wait for more pages."""
    promised_chunks: int
    """Chunks that the running requests' pages touch, mapped or not."""
    cached_chunks: int
    """Chunks that only cached pages touch; they are given up as soon as a request needs them."""
    mapped_chunks: int
    """Chunks in physical memory: all that are cached, and the promised ones that were written."""
    evicted_pages: int
    """Cached pages given up for promises since the start."""


class RankSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One attention rank as the scheduler sees it. Its budget is promised, cached or free."""

    device: str
    away: bool
    """Whether the rank is lost and not back yet; nothing runs there."""
    running: int
    paused: int
    steps_in_flight: int
    lanes: int = 0
    """Steps that can be in flight at once."""
    busy_seconds: float = 0.0
    """Seconds of all steps that have ended, added up."""
    budget_chunks: int
    free_chunks: int
    promised_chunks: int
    cached_chunks: int
    mapped_chunks: int
    budget_bytes: int
    free_bytes: int
    promised_bytes: int
    cached_bytes: int
    mapped_bytes: int
    models: list[KVShare]
    """Entries in ascending order of the models' numbers."""


class ModelCounts(msgspec.Struct, kw_only=True):
    """One model's traffic since the scheduler's start."""

    requests: int = 0
    """Requests received, refused ones included."""
    admitted: int = 0
    finished: dict[str, int] = msgspec.field(default_factory=lambda: {"stop": 0, "length": 0})
    """Requests that ended by themselves, by reason."""
    aborted: dict[str, int] = {}
    """Requests refused or aborted, by HTTP status."""
    prompt_tokens: int = 0
    """Prompt tokens computed, each once."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    prefix_hits: int = 0
    """Requests admitted with cached prompt tokens."""
    pauses: int = 0
    """Times that a running request had to wait for more pages."""
    replayed_requests: int = 0
    """Requests admitted again, since the attention rank on which they ran was lost."""
    replayed_tokens: int = 0
    """Tokens of those requests computed again, sampled ones included."""
    output_tokens: int = 0
    """Tokens sampled."""
    steps: int = 0
    decode_rows: int = 0
    """Rows that fed back a sampled token; divided by ``steps``, the mean decode batch."""
    largest_batch: int = 0
    """Most requests in one step."""


class ModelStatus(ModelCounts, kw_only=True):
    """One model: its requests and KV memory now, over all attention ranks, its counters, and what
    is known about it from its config and the deployment."""

    model: int
    """The model's number."""
    name: str
    waiting: int
    """Requests queued, those included whose grammar is being compiled."""
    waiting_tokens: int
    """Prompt tokens of the queued requests."""
    compiling: int
    running: int
    paused: int
    promised_chunks: int
    cached_chunks: int
    mapped_chunks: int
    promised_bytes: int
    cached_bytes: int
    mapped_bytes: int
    evicted_pages: int
    tokens_per_second: float
    """Tokens sampled per second, over the last 10 s."""
    cache_hit_rate: float
    """Share of prompt tokens that were cached, from 0 to 1, of requests admitted in the last 60 s;
    0 where none was."""
    path: str
    context: int
    """Longest sequence of the model, in tokens."""
    dtype: str
    kv_dtype: str
    """Data type of its KV cache."""
    kv_bytes_per_token: int
    max_tokens: int
    """Longest sequence that can be served: ``context``, or what one rank's KV pool holds."""
    pool_tokens: int
    """Tokens that the whole KV pool could hold if no other model used it."""
    ffn_ranks: tuple[int, ...]
    residency: ModelResidency
    attached: int = 0
    """Stock SGLang servers that are attached to the model."""

    @property
    def used_tokens(self) -> int:
        """Tokens that fit into the KV memory that is promised to running requests."""
        return self.promised_bytes // self.kv_bytes_per_token

    def summary(self) -> dict[str, Any]:
        """What an admin is told of the model: where its weights are, and who needs them."""
        return {
            "name": self.name,
            **msgspec.to_builtins(self.residency),
            "running": self.running,
            "waiting": self.waiting,
            "kv_bytes": self.mapped_bytes,
            "tokens_per_second": self.tokens_per_second,
        }

    @property
    def token_usage(self) -> float:
        """Share of the KV pool, from 0 to 1, that is promised to the model's running requests."""
        return self.used_tokens / self.pool_tokens if self.pool_tokens else 0.0


class WeightUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank holds of all models' weights now, those being read included."""

    pool: Literal["kv", "weight"]
    device: str
    bytes: int
    budget_bytes: int | None
    """None without a bound."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's state at one moment."""

    models: list[ModelStatus]
    """Entries in ascending order of the models' numbers. A model that is being loaded is none of
    them yet."""
    ranks: list[RankSnapshot]
    weights: list[WeightUse] = []
    """One entry for each rank of either pool."""
    failure: str | None
    """Why every request is refused; None while all is well."""


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One device and its process, as far as the scheduler knows."""

    name: str
    ready: bool
    node: int = 0
    """Number of its host."""
    pid: int | None
    """None while it is not ready."""
    ranks: list[RankInfo]
    """Empty until it has been ready."""
    incarnation: int = 1
    """The number of the process that works or is expected: 1 for the first."""
    restarts: int = 0
    """How often another process has become ready in place of one that died."""
    away_since: float | None = None
    """Unix time at which it died; None unless it has been ready and is to be again."""
    away_cause: str | None = None
    """Why it is away."""
    seconds_away: float = 0.0
    """Seconds for which it has been away since the start, all times together."""

    @property
    def absence(self) -> str | None:
        """A text for the user of a device that is away, with its ranks; None while it is not."""
        if self.away_since is None:
            return None
        names = {"attention": "attention rank", "ffn": "FFN rank"}
        ranks = ", ".join(f"{names[rank.role]} {rank.rank}" for rank in self.ranks)
        since = datetime.fromtimestamp(self.away_since, UTC).isoformat(timespec="milliseconds")
        return f"{ranks} on {self.name} is away since {since}: {self.away_cause}"


class Status(Snapshot, frozen=True, kw_only=True):
    """The state of the whole deployment."""

    ready: bool
    message: str
    """What the deployment waits for, or why it has failed."""
    devices: list[DeviceStatus]
    incarnation: int = 1
    """The scheduler's number among those that there have been, from 1 on. Each counts anew."""
    spans_dropped: int = 0
    """Spans of requests that will never reach the collector of traces."""
