"""Reads routers and Mixture-of-Experts FFNs from a config.json, for all families."""

from __future__ import annotations

from crosspool.models.config_file import ConfigFile
from crosspool.models.spec import DenseFFN, FFNSpec, MoEFFN, RouterSpec


def softmax_moe(
    config: ConfigFile, *, experts: int, top_k: int, intermediate: int, renormalize: bool
) -> MoEFFN:
    """Reads routed experts that are chosen by softmax. ``experts`` and ``top_k`` are the family's
    defaults; ``intermediate`` is the intermediate size of an expert."""
    count = config.integer(config.spelling("num_experts", "num_local_experts"), experts)
    router = RouterSpec(
        score="softmax",
        top_k=config.integer("num_experts_per_tok", top_k),
        renormalize=renormalize,
    )
    return MoEFFN(
        experts=count, intermediate=intermediate, router=check_router(config, router, count)
    )


def sigmoid_router(
    config: ConfigFile, *, top_k: int, groups: int, top_groups: int, scale: float
) -> RouterSpec:
    """Reads a router with DeepSeek-V3's rules; the numbers are the family's defaults."""
    return RouterSpec(
        score="sigmoid",
        top_k=config.integer("num_experts_per_tok", top_k),
        groups=config.integer("n_group", groups),
        top_groups=config.integer("topk_group", top_groups),
        group_score="top2_sum",
        correction_bias=True,
        renormalize=config.boolean("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", scale),
        fp32_logits=True,
    )


def moe_with_shared(
    config: ConfigFile, router: RouterSpec, *, experts: int, intermediate: int, shared: int | None
) -> MoEFFN:
    """Reads routed experts of ``moe_intermediate_size``, and ``n_shared_experts`` of that size."""
    count = config.integer(config.spelling("n_routed_experts", "num_local_experts"), experts)
    size = config.integer("moe_intermediate_size", intermediate)
    shared_experts = config.optional_integer("n_shared_experts", shared, minimum=0) or 0
    return MoEFFN(
        experts=count,
        intermediate=size,
        router=check_router(config, router, count),
        shared_intermediate=shared_experts * size,
    )


def leading_dense(
    config: ConfigFile, layers: int, first: int, dense: DenseFFN, moe: MoEFFN
) -> tuple[FFNSpec, ...]:
    """Returns the FFNs of all layers; the leading ones are dense, ``first`` of them by default."""
    leading = min(config.integer("first_k_dense_replace", first, minimum=0), layers)
    return (dense,) * leading + (moe,) * (layers - leading)


def alternating_dense(
    config: ConfigFile, layers: int, dense: DenseFFN, moe: MoEFFN
) -> tuple[FFNSpec, ...]:
    """Returns the FFNs of all layers by the fields of Qwen's MoE models: dense are those that
    ``mlp_only_layers`` lists, and those between every ``decoder_sparse_step``-th one."""
    listed, step = config.integers("mlp_only_layers"), config.integer("decoder_sparse_step", 1)
    return tuple(dense if layer in listed or (layer + 1) % step else moe for layer in range(layers))


def check_router(config: ConfigFile, router: RouterSpec, experts: int) -> RouterSpec:
    """Returns the router. Raises ConfigError when its groups have too few experts for ``top_k``."""
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
