"""The models as a table for a terminal: where their weights are, and who uses them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from crosspool.config.deployment import Deployment
from crosspool.config.sizes import format_size
from crosspool.transport.inspection import ModelResidency, ModelStatus

_COLUMNS = (
    *("state", "keep", "FFN", "attention", "KV", "running", "waiting", "tokens/s"),
    *("used", "wakes", "took"),
)
_WORDS = ("state", "keep")
_IN_MEMORY = ("waking", "resident", "falling_asleep", "leaving")
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def models_table(deployment: Deployment, models: Sequence[ModelStatus]) -> Table:
    """Renders a row for each model, and below them what they take together of the pools."""
    ffn, attention = (
        sum(getattr(m.residency, key) for m in models if m.residency.state in _IN_MEMORY)
        for key in ("ffn_bytes", "attention_bytes")
    )
    kv = sum(model.mapped_bytes for model in models)
    table = Table(
        caption=f"in memory: FFN weights {_of(ffn, deployment.weight_pool_bytes)}, attention "
        f"weights {_of(attention, deployment.attention_weight_bytes)}, KV cache "
        f"{_of(kv, deployment.kv_pool_bytes)}",
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=True)
    for model in models:
        told = model.residency
        table.add_row(
            model.name,
            _state(told),
            told.keep,
            *_weights(told),
            format_size(model.mapped_bytes),
            str(model.running),
            str(model.waiting),
            f"{model.tokens_per_second:.1f}",
            _ago(told.idle_seconds),
            f"{told.wakes:,}" + (f" ({told.failed_wakes:,} failed)" if told.failed_wakes else ""),
            "" if told.last_wake_seconds is None else f"{told.last_wake_seconds:.2f} s",
        )
    return table


def _state(told: ModelResidency) -> str:
    if told.state == "waking" and told.total_bytes:
        return f"waking, {told.read_bytes / told.total_bytes:.0%}"
    return told.state.replace("_", " ")


def _weights(told: ModelResidency) -> tuple[str, str]:
    """What the model takes; in brackets what it would take, if it is asleep."""
    sizes = format_size(told.ffn_bytes), format_size(told.attention_bytes)
    return sizes if told.state in _IN_MEMORY else (f"({sizes[0]})", f"({sizes[1]})")


def _of(size: int, budget: int | None) -> str:
    return format_size(size) + (f" of {format_size(budget)}" if budget is not None else "")


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    if seconds == 0:
        return "now"
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
