"""What ``crosspool top`` shows, as a value: worked out from looks at a server, drawn elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from crosspool.observability.histograms import Histogram, ModelHistograms
from crosspool.transport.inspection import ModelStatus, RankSnapshot, Status

_IN_MEMORY = ("waking", "resident", "falling_asleep", "leaving")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What a server told at one moment."""

    at: float
    """A clock's time, in seconds."""
    status: Status
    histograms: Sequence[ModelHistograms]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Half and 99 % of the values lie below these, in seconds; None where there were none."""

    p50: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, histogram: Histogram | None) -> Latency:
        if histogram is None:
            return cls()
        return cls(p50=histogram.quantile(0.5), p99=histogram.quantile(0.99))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLine:
    """One model; sizes in bytes."""

    name: str
    number: int
    state: str
    share_read: float
    """Share of its weights that a model which wakes has read, from 0 to 1."""
    keep: str
    running: int
    waiting: int
    tokens_per_second: float
    first_token: Latency
    between_tokens: Latency
    kv_bytes: int
    attention_bytes: int
    ffn_bytes: int
    in_memory: bool
    """Whether its weights take memory of the pools."""
    cache_hit_rate: float
    wakes: int
    failed_wakes: int
    last_wake_seconds: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """What the models have of a pool, or of the disk."""

    title: str
    parts: tuple[tuple[int, int], ...]
    """Pairs (model's number, bytes)."""
    budget: int | None
    """Bytes; None without a bound."""
    most: int
    """Bytes that a full bar stands for."""

    @property
    def used(self) -> int:
        return sum(size for _, size in self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankLine:
    """One attention rank; sizes in bytes."""

    rank: int
    device: str
    promised: int
    cached: int
    budget: int
    busy: float | None
    """Share of its lanes' time with a step in flight, from 0 to 1; None before a second look."""
    away: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopState:
    where: str
    """The server's address."""
    message: str
    """What the server waits for, or why it has failed; empty while all is well."""
    seconds: float | None
    """Time that the quantiles are of; None for all since the server's start."""
    models: tuple[ModelLine, ...]
    """All models, in the order in which they are shown."""
    bars: tuple[Bar, ...]
    ranks: tuple[RankLine, ...]
    first_token: Latency
    between_tokens: Latency
    restarts: int
    sort: str
    selected: str | None = None
    """Name of the model that keys are about."""
    notice: str = ""
    """The last line, in place of the keys."""


def _slowest(latency: Latency) -> float:
    return -1.0 if latency.p99 is None else latency.p99


SORTS: dict[str, Callable[[ModelLine], tuple[Any, ...]]] = {
    "requests": lambda m: (-(m.running + m.waiting), -m.tokens_per_second, not m.in_memory),
    "name": lambda m: (),
    "state": lambda m: (m.state != "resident", m.state),
    "tokens/s": lambda m: (-m.tokens_per_second,),
    "TTFT": lambda m: (-_slowest(m.first_token),),
    "TBT": lambda m: (-_slowest(m.between_tokens),),
    "memory": lambda m: (-(m.kv_bytes + m.in_memory * (m.attention_bytes + m.ffn_bytes)),),
    "wakes": lambda m: (-m.wakes,),
}
"""What models can be sorted by: the name decides where these are equal."""


def top_state(
    where: str,
    look: Look,
    earlier: Look | None = None,
    *,
    sort: str = "requests",
    selected: str | None = None,
    notice: str = "",
) -> TopState:
    """What there is to see at ``look``. Quantiles and shares of time are of what has happened since
    the ``earlier`` look, if there is one."""
    then = {} if earlier is None else {h.model: h for h in earlier.histograms}
    first, between = (
        {
            h.model: getattr(h, name).since(getattr(then.get(h.model), name, None))
            for h in look.histograms
        }
        for name in ("first_token_seconds", "between_tokens_seconds")
    )
    models = [_model(m, first.get(m.model), between.get(m.model)) for m in look.status.models]
    names = {line.name for line in models}
    status = look.status
    return TopState(
        where=where,
        message=status.failure or ("" if status.ready else status.message),
        seconds=None if earlier is None else look.at - earlier.at,
        models=tuple(sorted(models, key=lambda m: (*SORTS[sort](m), m.name))),
        bars=tuple(_bars(status)),
        ranks=tuple(_ranks(look, earlier)),
        first_token=Latency.of(_sum(first.values())),
        between_tokens=Latency.of(_sum(between.values())),
        restarts=sum(device.restarts for device in status.devices),
        sort=sort,
        selected=selected if selected in names else None,
        notice=notice,
    )


def _sum(histograms: Any) -> Histogram | None:
    whole: Histogram | None = None
    for histogram in histograms:
        whole = histogram if whole is None else whole.plus(histogram)
    return whole


def _model(told: ModelStatus, first: Histogram | None, between: Histogram | None) -> ModelLine:
    residency = told.residency
    total = residency.total_bytes
    return ModelLine(
        name=told.name,
        number=told.model,
        state=residency.state,
        share_read=residency.read_bytes / total if total else 0.0,
        keep=residency.keep,
        running=told.running,
        waiting=told.waiting,
        tokens_per_second=told.tokens_per_second,
        first_token=Latency.of(first),
        between_tokens=Latency.of(between),
        kv_bytes=told.mapped_bytes,
        attention_bytes=residency.attention_bytes,
        ffn_bytes=residency.ffn_bytes,
        in_memory=residency.state in _IN_MEMORY,
        cache_hit_rate=told.cache_hit_rate,
        wakes=residency.wakes,
        failed_wakes=residency.failed_wakes,
        last_wake_seconds=residency.last_wake_seconds,
    )


def _bars(status: Status) -> list[Bar]:
    """The KV cache, the weights in each pool, and those on disk."""
    kv = sum(rank.budget_bytes for rank in status.ranks)
    parts = [(model.model, model.mapped_bytes) for model in status.models]
    bars = [Bar(title="KV cache", parts=tuple(parts), budget=kv, most=kv)]
    for title, pool, key in (
        ("attention", "kv", "attention_bytes"),
        ("FFN", "weight", "ffn_bytes"),
    ):
        sizes = [(m, getattr(m.residency, key)) for m in status.models]
        budgets = [use.budget_bytes for use in status.weights if use.pool == pool]
        known = [budget for budget in budgets if budget is not None]
        budget = sum(known) if known and len(known) == len(budgets) else None
        bars.append(
            Bar(
                title=title,
                parts=tuple(
                    (m.model, size) for m, size in sizes if m.residency.state in _IN_MEMORY
                ),
                budget=budget,
                most=budget if budget is not None else sum(size for _, size in sizes),
            )
        )
    weights = [(m, m.residency.attention_bytes + m.residency.ffn_bytes) for m in status.models]
    asleep = tuple((m.model, size) for m, size in weights if m.residency.state == "asleep")
    all_weights = sum(size for _, size in weights)
    return [*bars, Bar(title="on disk", parts=asleep, budget=None, most=all_weights)]


def _ranks(look: Look, earlier: Look | None) -> list[RankLine]:
    before: Sequence[RankSnapshot] = () if earlier is None else earlier.status.ranks
    seconds = 0.0 if earlier is None else look.at - earlier.at
    lines = []
    for index, rank in enumerate(look.status.ranks):
        busy = None
        if index < len(before) and seconds > 0 and rank.lanes:
            grown = rank.busy_seconds - before[index].busy_seconds
            busy = min(max(grown / seconds / rank.lanes, 0.0), 1.0)
        lines.append(
            RankLine(
                rank=index,
                device=rank.device,
                promised=rank.promised_bytes,
                cached=rank.cached_bytes,
                budget=rank.budget_bytes,
                busy=busy,
                away=rank.away,
            )
        )
    return lines
