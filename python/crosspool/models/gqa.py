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


def head_size(config: ConfigFile, hidden: int, heads: int, default: int | None = None) -> int:
    """Reads ``head_dim``. Without it the ``default`` counts, or an even share of the hidden size
    where the family has none."""
    size = config.optional_integer("head_dim", default)
    if size is None:
        if hidden % heads:
            raise config.error("num_attention_heads", f"must divide hidden_size={hidden}")
        size = hidden // heads
    if size % 2:
        raise config.error("head_dim", f"heads of {size} features cannot rotate in pairs")
    return size


def check_no_window(config: ConfigFile) -> None:
    """Raises ConfigError where some of the layers have a sliding window, which Qwen's fields
    ``use_sliding_window`` and ``layer_types`` say."""
    if config.boolean("use_sliding_window", False):
        raise config.error("use_sliding_window", "must be false: all layers see all tokens")
    types = config.values.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise config.error("layer_types", "must list full_attention for every layer")


def gqa(q_heads: int, kv_heads: int, head_dim: int, rotated: int | None = None) -> GQASpec:
    """Returns plain grouped-query attention; a family sets what it has beyond that. ``rotated``:
    features of a head that rotate; None: all of them."""
    return GQASpec(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=RopeSpec(dim=head_dim if rotated is None else rotated, interleaved=False),
    )
