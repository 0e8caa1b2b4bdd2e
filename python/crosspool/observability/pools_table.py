"""The pools as tables for a terminal: what each rank holds, what each model needs and uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from crosspool.config.sizes import format_size, kv_sizes
from crosspool.transport.inspection import DeviceStatus, ModelStatus, RankSnapshot


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """One rank; sizes in bytes."""

    rank: str
    """Role and number, as in ``attention 0`` or ``FFN 1``."""
    device: str
    weights: int
    kv_budget: int | None
    """None for an FFN rank."""
    now: RankSnapshot | None = None
    """None when the server has not been asked, and for an FFN rank."""
    process: DeviceStatus | None = None
    """The process of its device; None when the server has not been asked."""


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model; sizes in bytes."""

    name: str
    dtype: str
    kv_dtype: str
    """Data type of its KV cache."""
    attention_weights: int
    """Bytes on each attention rank."""
    ffn_weights: int
    """Bytes on all of the model's FFN ranks together."""
    ffn_ranks: tuple[int, ...]
    kv_per_token: int
    state: int
    """Recurrent state of each request; 0 for none."""
    pages: int
    """KV pages that the whole KV pool holds if this model has it to itself."""
    tokens: int
    """Tokens that these pages hold."""
    context: int
    """Longest sequence, in tokens."""


_WIDTH_OF_A_FILE = 140
_USE = ("KV promised", "KV cached", "KV mapped")
_PROCESS = ("restarts", "away")


def make_console() -> Console:
    """A console that does not squeeze tables when the output is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_A_FILE)


def pools_tables(
    ranks: Sequence[RankRow], models: Sequence[ModelRow], use: Sequence[ModelStatus] = ()
) -> Group:
    """Renders the tables. ``use`` has one entry for each model; without it, memory in use is left
    out."""
    live = _USE if use else ()
    process = _PROCESS if use else ()
    by_rank = _table("Pools", "rank", "device", "weights", "KV budget", *live, *process)
    for rank in ranks:
        cells = [rank.rank, rank.device, format_size(rank.weights), _size(rank.kv_budget)]
        by_rank.add_row(*cells, *((*_use(rank.now), *_process(rank.process)) if use else ()))
    by_model = _table(
        "Models",
        "model",
        "dtype",
        "attention weights",
        "FFN weights",
        "FFN ranks",
        "KV dtype",
        "KV / token",
        "KV pages",
        "tokens",
        "context",
    )
    for model in models:
        cells = [
            model.name,
            model.dtype,
            format_size(model.attention_weights),
            format_size(model.ffn_weights),
            ", ".join(map(str, model.ffn_ranks)),
            model.kv_dtype,
            kv_sizes(model.kv_per_token, model.state),
            f"{model.pages:,}",
            f"{model.tokens:,}",
            f"{model.context:,}",
        ]
        by_model.add_row(*cells)
    if not use:
        return Group(by_rank, Text(), by_model)
    now = _table(
        "KV memory now",
        "model",
        "running",
        "waiting",
        *_USE,
        "prompt tokens",
        "found cached",
        "pages given up",
    )
    for row in use:
        prompt = row.prompt_tokens + row.cached_tokens
        now.add_row(
            row.name,
            str(row.running),
            str(row.waiting),
            *_use(row),
            f"{prompt:,}",
            f"{row.cached_tokens:,}",
            f"{row.evicted_pages:,}",
        )
    return Group(by_rank, Text(), by_model, Text(), now)


def _table(title: str, first: str, second: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, overflow="fold")
    table.add_column(second)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _use(now: RankSnapshot | ModelStatus | None) -> tuple[str, ...]:
    if now is None:
        return ("",) * len(_USE)
    return tuple(map(format_size, (now.promised_bytes, now.cached_bytes, now.mapped_bytes)))


def _process(process: DeviceStatus | None) -> tuple[str, ...]:
    if process is None:
        return ("",) * len(_PROCESS)
    now = "" if process.away_since is None else f"now: {process.away_cause}"
    return str(process.restarts), now or f"{process.seconds_away:.1f} s"


def _size(size: int | None) -> str:
    return "" if size is None else format_size(size)
