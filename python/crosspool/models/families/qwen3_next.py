"""Qwen3-Next (``qwen3_next``): three layers in four have a gated delta net, the others gated
attention; softmax routing beside a shared expert that has a gate."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.delta_net import delta_net, gated_attention
from crosspool.models.family import Family, FFNNames
from crosspool.models.moe import alternating_dense, softmax_moe
from crosspool.models.spec import DenseFFN, FFNSpec


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    routed = softmax_moe(
        config,
        experts=512,
        top_k=10,
        intermediate=config.integer("moe_intermediate_size", 512),
        renormalize=config.boolean("norm_topk_prob", True),
    )
    shared = config.integer("shared_expert_intermediate_size", 512)
    moe = replace(routed, shared_intermediate=shared, shared_gate=True)
    dense = DenseFFN(intermediate=config.integer("intermediate_size", 5632))
    return alternating_dense(config, layers, dense, moe)


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    attention=gated_attention,
    ffn=_ffn,
    delta_net=delta_net,
    names=FFNNames(shared="mlp.shared_expert"),
    vocab=151936,
    hidden=2048,
    layers=48,
    context=32768,
    norm_eps=1e-6,
    zero_centred=True,
    eos_token_id=None,
)
