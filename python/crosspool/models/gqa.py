"""Reads grouped-query attention from a config.json, for the families that have it."""

from __future__ import annotations

from crosspool.models.config_file import ConfigFile
from crosspool.models.spec import GQASpec, RopeSpec


def grouped_heads(
    config: ConfigFile, q_heads: int, kv_heads: int | None, null_means_all: bool
) -> tuple[int, int]:
    """Reads the numbers of query and KV heads. ``kv_heads`` is the default; None, and null in the
    file if ``null_means_all``, mean as many as there are query heads."""
    q = config.integer("num_attention_heads", q_heads)
    kv = config.optional_integer("num_key_value_heads", kv_heads)
    if kv is None:
        if not null_means_all:
            raise config.error("num_key_value_heads", "must be an integer of at least 1")
        kv = q
    if q % kv:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads={q}")
    return q, kv


def head_size(config: ConfigFile, hidden: int, heads: int) -> int:
    """Reads ``head_dim``, which is an even share of the hidden size by default."""
    if config.values.get("head_dim") is None and hidden % heads:
        raise config.error("num_attention_heads", f"must divide hidden_size={hidden}")
    size = config.integer("head_dim", None) if config.values.get("head_dim") else hidden // heads
    if size % 2:
        raise config.error("head_dim", f"heads of {size} features cannot rotate in pairs")
    return size


def gqa(q_heads: int, kv_heads: int, head_dim: int) -> GQASpec:
    """Returns plain grouped-query attention; a family sets what it has beyond that."""
    return GQASpec(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=RopeSpec(dim=head_dim, interleaved=False),
    )
