"""What a family's file provides, and the readers that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crosspool.models.config_file import ConfigFile
from crosspool.models.spec import AttentionSpec, FFNSpec, GQASpec, RopeSpec, RouterSpec


@dataclass(frozen=True, kw_only=True)
class FFNNames:
    """How the checkpoints of a family call their FFN tensors, beneath ``model.layers.N.``."""

    block: str = "mlp"
    """Prefix of the router, the experts, and of a dense layer's projections."""
    shared: str = "mlp.shared_experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models. The numbers are transformers' defaults for fields that a config.json
    may leave out."""

    model_type: str
    architecture: str
    attention: Callable[[ConfigFile, int], AttentionSpec]
    """Of the file and the hidden size."""
    ffn: Callable[[ConfigFile, int], tuple[FFNSpec, ...]]
    """Of the file and the number of layers: one per layer."""
    names: FFNNames = FFNNames()
    vocab: int
    hidden: int
    layers: int
    context: int
    norm_eps: float
    eos_token_id: int | None


def grouped_heads(
    config: ConfigFile, q_heads: int, kv_heads: int | None, null_means_all: bool
) -> tuple[int, int]:
    """Query and KV heads. ``kv_heads`` is the default; None, or null in the file if
    ``null_means_all``, stands for as many as query heads."""
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
    """``head_dim``, or an even share of the hidden size."""
    if config.values.get("head_dim") is None and hidden % heads:
        raise config.error("num_attention_heads", f"must divide hidden_size={hidden}")
    size = config.integer("head_dim", None) if config.values.get("head_dim") else hidden // heads
    if size % 2:
        raise config.error("head_dim", f"heads of {size} features cannot rotate in pairs")
    return size


def gqa(q_heads: int, kv_heads: int, head_dim: int) -> GQASpec:
    """Plain grouped-query attention; a family changes what it has beyond that."""
    return GQASpec(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=RopeSpec(dim=head_dim, interleaved=False),
    )


def check_router(config: ConfigFile, router: RouterSpec, experts: int) -> RouterSpec:
    """Raises ConfigError when a token cannot choose as many experts as it must."""
    if experts % router.groups:
        raise config.error("n_group", f"must divide the number of experts, {experts}")
    if router.top_groups > router.groups:
        raise config.error("topk_group", f"must be at most n_group={router.groups}")
    choice = experts // router.groups * router.top_groups
    if router.top_k > choice:
        raise config.error(
            "num_experts_per_tok", f"must be at most {choice}, the experts to choose from"
        )
    if router.group_score == "top2_sum" and experts // router.groups < 2:
        raise config.error("n_group", "every group must have at least two experts")
    return router
